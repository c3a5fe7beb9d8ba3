"""Bounding the denoised estimate."""

from torch import Tensor

from diffx.denoisers import Denoiser


class StaticThresholding(Denoiser):
    r"""x̂ clipped to the range of the data.

    x̂ = E[x | x_t] lies in the convex hull of the data, hence clipping corrects errors only; ε-prediction near zero SNR
    needs it. Ho et al. (arXiv 2006.11239), released code; named in Saharia et al., *Imagen* (arXiv 2205.11487),
    Sec. 2.3.

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

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser(x_t, t, **cond).clamp(self.low, self.high)


def unthresholded(denoiser: Denoiser) -> Denoiser:
    """The denoiser as it is."""
    return denoiser
