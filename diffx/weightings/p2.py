"""Perception prioritized training."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class P2(Weighting):
    r"""The noise error's weight, lowered where only imperceptible details are left to learn.

    w = SNR/(k + SNR)^γ, that is 1/(k + SNR)^γ on ‖ε̂ − ε‖². Choi et al., *Perception Prioritized Training of Diffusion
    Models* (arXiv 2204.00227), their λ′_t. Equals `SNR` (`Unit` × ε) for γ = 0, and `SoftMinSNR` with γ′ = k, up to the
    factor k, for γ = 1.

    Use it when coarse content matters more than pixel-exact detail, on small or very clean data.

    Arguments:
        k: k > 0, keeps the weight of the noisiest levels finite.
        gamma: γ ≥ 0; the paper takes 0.5 or 1.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.k = k
        self.gamma = gamma

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        logsnr = denoiser.schedule.logsnr(t)
        # through the logarithm: for γ > 1 the power overflows before the quotient does
        return torch.exp(logsnr - self.gamma * torch.log(self.k + logsnr.exp()))
