"""Noise prediction."""

import torch
from torch import Tensor

from diffx.parameterizations.base import Parameterization


class Eps(Parameterization):
    r"""The network predicts the noise.

    F = z: x̂ = (x_t − σ·F)/α. Ho et al., *Denoising Diffusion Probabilistic Models* (arXiv 2006.11239), Eq. 14. c_in =
    1/√(α² + σ²) is 1 for a variance-preserving schedule and keeps the input of a variance-exploding one in range.
    Undefined where α = 0. Use it when results are compared with DDPM, with many steps and thresholded samples.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.rsqrt(alpha**2 + sigma**2), 1 / alpha, -sigma / alpha
