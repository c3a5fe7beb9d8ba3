"""Min-SNR without the kink."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class SoftMinSNR(Weighting):
    r"""Min-SNR with a smooth transition.

    w = 1/(1/SNR + 1/γ) = γ·SNR/(SNR + γ), half the harmonic mean of SNR and γ; with α = 1, 1/(σ² + 1/γ). Crowson et
    al., *Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers* (arXiv
    2401.11605), the soft form of `MinSNR`. Equals `Sigmoid` with b = log γ; γ = 1/σ_d² makes it 1/(σ² + σ_d²).

    Use it when min-SNR is wanted, and its kink at SNR = γ shows in the loss per noise level.

    Arguments:
        gamma: γ > 0.
    """

    def __init__(self, gamma: float = 4.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return 1 / (torch.exp(-denoiser.schedule.logsnr(t)) + 1 / self.gamma)
