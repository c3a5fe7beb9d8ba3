"""Classifier-free guidance."""

from typing import Protocol

import torch
from torch import Tensor

from diffx.denoisers import Denoiser


class NullConditions(Protocol):
    """What knows the conditions of an unconditional sample: a conditioner."""

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """The null conditions of n samples, each of shape `[n, …]`."""
        ...


class ClassifierFree(Denoiser):
    r"""x̂ = x̂_∅ + scale·(x̂_c − x̂_∅), both from one forward pass of twice the batch.

    Ho and Salimans, *Classifier-Free Diffusion Guidance* (arXiv 2207.12598), Eq. 6, with scale = 1 + w: 1 is the
    conditional model, 0 the unconditional one. Guidance is affine, so that guiding x̂, ε or v is the same.

    Arguments:
        denoiser: a denoiser trained with dropped conditions.
        conditioner: gives the null conditions.
        scale: the guidance scale.
    """

    def __init__(self, denoiser: Denoiser, conditioner: NullConditions, scale: float = 1.5) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.conditioner = conditioner
        self.scale = scale

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if self.scale == 1 or not cond:
            return self.denoiser(x_t, t, **cond)
        null = self.conditioner.null(len(x_t), x_t.device)
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        t_both = torch.cat([t, t]) if t.ndim else t
        conditional, unconditional = self.denoiser(torch.cat([x_t, x_t]), t_both, **both).chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)


def unguided(denoiser: Denoiser, conditioner: NullConditions) -> Denoiser:
    """The denoiser as it is."""
    return denoiser
