"""The generalised variance-preserving path."""

import math

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class GeneralizedVP(Schedule):
    r"""The trigonometric path: variance preserving up to pure noise.

    α(t) = cos(π/2·t), σ(t) = sin(π/2·t), GVP of Ma et al., *SiT* (arXiv 2401.08740), Sec. 2, after Albergo et al.,
    *Stochastic Interpolants* (arXiv 2303.08797); it extends the VP SDE of Song et al. (arXiv 2011.13456), whose α never
    reaches 0. α(1) = 0: ε-prediction is undefined there. Use it when a variance-preserving schedule shall end at pure
    noise.
    """

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # the cosine of a rounded π/2 is not 0
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def inverse(self, logsnr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)
