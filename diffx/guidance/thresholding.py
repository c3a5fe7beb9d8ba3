"""Bounding the denoised estimate."""

import math

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.schedules import NoiseLevel
from diffx.utils import DiffxError, expand_as


class StaticThresholding(Denoiser):
    r"""x̂ clipped to the range of the data.

    x̂ = E[x | x_t] lies in the convex hull of the data, hence clipping corrects errors only; ε-prediction near zero SNR
    needs it. Ho et al. (arXiv 2006.11239), released code; named in Saharia et al., *Imagen* (arXiv 2205.11487),
    Sec. 2.3. Use it when the data have a known range, as pixels do.

    Arguments:
        denoiser: the denoiser, of pixels in [−1, 1].
        low: the smallest value of the data.
        high: the largest.
    """

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.low = low
        self.high = high

    def at(self, level: NoiseLevel) -> Denoiser:
        return self.replaced(denoiser=self.denoiser.at(level))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser(x_t, t, **cond).clamp(self.low, self.high)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ clipped, and v as it is."""
        x_hat, v = self.denoiser.posterior(x_t, t, s, **cond)
        return x_hat.clamp(self.low, self.high), v


class DynamicThresholding(Denoiser):
    r"""x̂ clipped to a quantile of its own absolute values, and divided by it.

    clip(x̂, −s, s)·(b/s) with s the larger of the bound b and the p-quantile of |x̂| over a sample's dimensions: the
    smallest value that at least a share p of them does not exceed. Saharia et al., *Photorealistic Text-to-Image
    Diffusion Models with Deep Language Understanding* (arXiv 2205.11487), Sec. 2.3. Use it when a high guidance scale
    drives so many pixels to the bounds that static thresholding makes flat, saturated areas.

    Arguments:
        denoiser: the denoiser, of data in [−bound, bound].
        percentile: p ∈ (0, 1].
        bound: b > 0, the largest absolute value of the data.

    Raises:
        DiffxError: if the percentile is no such share.
    """

    def __init__(self, denoiser: Denoiser, percentile: float = 0.995, bound: float = 1.0) -> None:
        super().__init__()
        if not 0 < percentile <= 1:
            raise DiffxError(
                f"thresholding.percentile is {percentile}; give a share above 0 and up to 1, such as 0.995"
            )
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.percentile = percentile
        self.bound = bound

    def at(self, level: NoiseLevel) -> Denoiser:
        return self.replaced(denoiser=self.denoiser.at(level))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._bounded(self.denoiser(x_t, t, **cond))

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ bounded, and v as it is."""
        x_hat, v = self.denoiser.posterior(x_t, t, s, **cond)
        return self._bounded(x_hat), v

    def _bounded(self, x_hat: Tensor) -> Tensor:
        values = x_hat.abs().flatten(1)
        # a little less than the product, so that rounding does not make 9.000000001 a 10; torch.quantile has a limit of
        # 16 million numbers, which a batch of images exceeds
        rank = max(1, math.ceil(self.percentile * values.shape[1] - 1e-9))
        s = expand_as(values.kthvalue(rank, dim=1).values.clamp(min=self.bound), x_hat)
        return x_hat.clamp(-s, s) * (self.bound / s)


def unthresholded(denoiser: Denoiser) -> Denoiser:
    """The denoiser as it is."""
    return denoiser
