"""The sub-VP SDE."""

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class SubVP(Schedule):
    r"""The sub-VP SDE: the signal of the linear schedule with less noise.

    α(t) = exp(−½·∫β), σ(t) = 1 − α(t)², with β linear in t. Song et al. (arXiv 2011.13456), Eq. 29 (third row) with the
    β(t) of Eq. 33: α is that of `Linear`, and σ its σ², so that α² + σ² < 1 between the ends. Use it when likelihood
    counts: the paper's best bits/dim are on it.

    Arguments:
        beta_min: β at t = 0, ≥ 0.
        beta_max: β at t = 1, > beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__()
        self.beta_min = beta_min
        self.beta_max = beta_max

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = -(self.beta_min + (self.beta_max - self.beta_min) / 2 * t) * t
        return torch.exp(log_alpha_bar / 2), -torch.expm1(log_alpha_bar)
