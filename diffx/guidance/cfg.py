"""Classifier-free guidance."""

from collections.abc import Sequence

from torch import Tensor

from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser
from diffx.guidance.guided import Guided, told_otherwise
from diffx.guidance.interval import Rows
from diffx.guidance.rules import Rule
from diffx.utils import DiffxError


class ClassifierFree(Guided):
    r"""Classifier-free guidance: the guide is the same network told nothing, in the same forward pass.

    x̂ = x̂_∅ + w·(x̂_c − x̂_∅), both from one pass of twice the batch. Ho and Salimans, *Classifier-Free Diffusion
    Guidance* (arXiv 2207.12598), Eq. 6, with w one more than theirs: 1 is the conditional model, 0 the unconditional
    one. Guidance is affine, so that guiding x̂, ε or v is the same. Use it when the model was trained with dropped
    conditions and samples shall look more like their class, at the price of variety.

    Arguments:
        denoiser: a denoiser trained with dropped conditions.
        conditioner: gives the null conditions.
        scale: w, the guidance scale.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        rescale: φ ∈ [0, 1], how far the contrast of the unguided estimate is restored.
        rule: how the two estimates are combined; None is `Linear`.

    Raises:
        DiffxError: if the model is unconditional.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        scale: float = 1.5,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        rule: Rule | None = None,
    ) -> None:
        super().__init__(denoiser, scale, interval, rescale, rule)
        if not conditioner.null(1):
            raise DiffxError(
                "classifier-free guidance needs a conditional model; set guidance=none or conditioning=label"
            )
        self.conditioner = conditioner

    def estimates(self, x_t: Tensor, t: Tensor, rows: Rows, **cond: Tensor) -> tuple[Tensor, Tensor]:
        if not cond:  # told nothing already
            x_hat = self.denoiser(x_t, t)
            return x_hat, x_hat[rows]
        null = self.conditioner.null(len(x_t[rows]), x_t.device)
        return told_otherwise(self.denoiser, x_t, t, rows, cond, null)


def unguided(denoiser: Denoiser, conditioner: Conditioner) -> Denoiser:
    """The denoiser as it is."""
    return denoiser
