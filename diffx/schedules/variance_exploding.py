"""Variance-exploding schedules: α = 1."""

import math

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class EDM(Schedule):
    r"""EDM's schedule: noise of growing σ is added to data that stay as they are.

    α(t) = 1, σ(t) = σ_max·t. Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models* (arXiv
    2206.00364), Table 1: σ(t) = t up to the unit of time. Use it when times are drawn through σ, with
    time_sampler=lognormal, parameterization=edm and discretization=karras.

    Arguments:
        sigma_max: σ at t = 1, > 0, in units of the data's standard deviation (data in [−1, 1]: about 0.5).
    """

    def __init__(self, sigma_max: float = 80.0) -> None:
        super().__init__()
        self.sigma_max = sigma_max

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def inverse(self, logsnr: Tensor) -> Tensor:
        return (torch.exp(-logsnr / 2) / self.sigma_max).clamp(max=1)


class VarianceExploding(Schedule):
    r"""The VE SDE: noise whose σ grows geometrically.

    α(t) = 1, σ(t)² = σ_min²·((σ_max/σ_min)^{2t} − 1), the transition kernel of Song et al. (arXiv 2011.13456), Eq. 29
    with the σ(t) of Eq. 31: geometric in t but for the start, where it reaches σ(0) = 0. Use it when results are
    compared with NCSN or the VE SDE.

    Arguments:
        sigma_min: the smallest scale of noise, > 0.
        sigma_max: the largest, > sigma_min.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return torch.ones_like(t), self.sigma_min * torch.sqrt(torch.expm1(2 * log_ratio * t))

    def inverse(self, logsnr: Tensor) -> Tensor:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return (torch.log1p(torch.exp(-logsnr) / self.sigma_min**2) / (2 * log_ratio)).clamp(max=1)
