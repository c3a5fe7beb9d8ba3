"""Weightings that are functions of the signal-to-noise ratio."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class SNR(Weighting):
    r"""The squared error of the noise estimate, whatever the network predicts.

    w = SNR = α²/σ². Ho et al. (arXiv 2006.11239); Salimans and Ho (arXiv 2202.00512), Sec. 4. Equals `Unit` × ε.

    Use it when a network that predicts something else than ε shall be trained on DDPM's L_simple.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return denoiser.schedule.logsnr(t).exp()


class MinSNR(Weighting):
    r"""The noise error's weight, cut off at low noise.

    w = min(SNR, γ). Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy* (arXiv 2303.09556),
    Eq. 8, in x̂-space. For ε-prediction that is min(SNR, γ)/SNR on the network's error, for v-prediction
    min(SNR, γ)/(SNR + 1). Equals `Unit` × ε wherever SNR ≤ γ.

    Use it when training converges slowly because the nearly clean samples outweigh all others.

    Arguments:
        gamma: γ > 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return denoiser.schedule.logsnr(t).exp().clamp(max=self.gamma)


class EDM(Weighting):
    r"""The weight under which EDM's network starts with an error of 1 at every noise level.

    w = SNR + 1/σ_d², EDM's λ(σ) = (σ² + σ_d²)/(σ·σ_d)² with σ² = 1/SNR. Karras et al. (arXiv 2206.00364), Table 1.
    Equals `Unit` × EDM, and with σ_d = 1 `Unit` × v, the "SNR + 1" of Salimans and Ho (arXiv 2202.00512), Sec. 4.

    Use it when EDM's training is to be reproduced, with the log-normal density of noise levels.

    Arguments:
        sigma_data: σ_d, the standard deviation of the data, > 0.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return torch.exp(denoiser.schedule.logsnr(t)) + self.sigma_data**-2
