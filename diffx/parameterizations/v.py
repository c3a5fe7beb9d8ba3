"""Velocity prediction of progressive distillation."""

import torch
from torch import Tensor

from diffx.parameterizations.base import Parameterization


class V(Parameterization):
    r"""The network predicts a mixture of noise and data that is well defined at every noise level.

    F = v = (α·z − σ·x)/r with r² = α² + σ²: x̂ = (α/r²)·x_t − (σ/r)·F. Salimans and Ho, *Progressive Distillation*
    (arXiv 2202.00512), App. D: there r = 1. For another schedule it is their v after x_t has been scaled to the
    variance-preserving x_t/r. Use it when steps are few, the schedule ends at zero SNR, or nothing speaks for another.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_in = torch.rsqrt(alpha**2 + sigma**2)
        return c_in, alpha * c_in**2, -sigma * c_in
