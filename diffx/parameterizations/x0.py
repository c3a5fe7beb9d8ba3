"""Data prediction."""

import torch
from torch import Tensor

from diffx.parameterizations.base import Parameterization


class X0(Parameterization):
    r"""The network predicts the clean sample.

    F = x: x̂ = F. Salimans and Ho, *Progressive Distillation* (arXiv 2202.00512), Sec. 4. c_in = 1/√(α² + σ²) as for
    `Eps`. Use it when high noise levels matter more than fine detail.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.rsqrt(alpha**2 + sigma**2), torch.zeros_like(alpha), torch.ones_like(alpha)
