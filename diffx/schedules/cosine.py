"""IDDPM's cosine schedule."""

import math

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class Cosine(Schedule):
    r"""The cosine schedule: variance preserving, with the signal falling like a squared cosine.

    ᾱ(t) = cos²(π/2·(t + s)/(1 + s)) / cos²(π/2·s/(1 + s)). Nichol and Dhariwal, *Improved Denoising Diffusion
    Probabilistic Models* (arXiv 2102.09672), Eq. 17. Its ᾱ(1) = 0 is raised to `alpha_bar_min`,
    ᾱ ← ᾱ_min + (1 − ᾱ_min)·ᾱ, which moves no other value by more than that: the paper clips β at 0.999 for the same
    reason, so that ε-prediction stays defined. Use it when images are small, up to about 64 pixels, and nothing
    speaks for another.

    Arguments:
        s: offset that keeps the noise near t = 0 from vanishing, > 0.
        alpha_bar_min: ᾱ(1), in (0, 1); 3·10⁻⁷ is a logSNR of −15.
    """

    def __init__(self, s: float = 0.008, alpha_bar_min: float = 3e-7) -> None:
        super().__init__()
        self.s = s
        self.alpha_bar_min = alpha_bar_min

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start = math.pi / 2 * self.s / (1 + self.s)
        rise = math.pi / 2 * t / (1 + self.s)
        # cos²a − cos²(a + b) = sin(b)·sin(2a + b): no cancellation where t is small
        noise = (1 - self.alpha_bar_min) * torch.sin(rise) * torch.sin(rise + 2 * start) / math.cos(start) ** 2
        signal = torch.cos(rise + start) ** 2 / math.cos(start) ** 2
        return torch.sqrt(self.alpha_bar_min + (1 - self.alpha_bar_min) * signal), torch.sqrt(noise)
