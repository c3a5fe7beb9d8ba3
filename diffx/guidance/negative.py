"""Guidance away from a class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser
from diffx.guidance.guided import Guided, told_otherwise
from diffx.guidance.interval import Rows
from diffx.guidance.rules import Rule
from diffx.utils import DiffxError


class Negative(Guided):
    r"""Guidance away from one class: the guide is the same network told that class.

    x̂ = x̂_k + w·(x̂_c − x̂_k), classifier-free guidance (arXiv 2207.12598, Eq. 6) with the class k in place of no class;
    Liu et al., *Compositional Visual Generation with Composable Diffusion Models* (arXiv 2206.01714), negate
    concepts likewise; for texts it is known as the negative prompt. Samples that are asked to be of class k are left as
    they are. Use it when samples come out as a class that they are confused with.

    Arguments:
        denoiser: a denoiser conditioned on labels.
        conditioner: knows the labels.
        label: k, the class to avoid.
        scale: w, the guidance scale; 1 is unguided.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        rescale: φ ∈ [0, 1], how far the contrast of the unguided estimate is restored.
        rule: how the two estimates are combined; None is `Linear`.

    Raises:
        DiffxError: if the model is not conditioned on labels or there is no such class.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        label: int,
        scale: float = 1.5,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        rule: Rule | None = None,
    ) -> None:
        super().__init__(denoiser, scale, interval, rescale, rule)
        if "label" not in conditioner.null(1):
            raise DiffxError(
                "guidance away from a class needs a model that knows classes; set guidance=none or conditioning=label"
            )
        conditioner.check(label)
        self.conditioner = conditioner
        self.label = label

    def estimates(self, x_t: Tensor, t: Tensor, rows: Rows, **cond: Tensor) -> tuple[Tensor, Tensor]:
        # without conditions it is the unconditional model that is guided
        told = self.conditioner.null(len(x_t), x_t.device) | cond
        avoided = torch.full_like(told["label"][rows], self.label)
        return told_otherwise(self.denoiser, x_t, t, rows, told, {"label": avoided})
