"""The sigmoid weighting."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class Sigmoid(Weighting):
    r"""The noise error's weight, faded out smoothly beyond a given logSNR.

    w = SNR·sigmoid(b − logSNR) = 1/(1/SNR + e^{−b}), that is sigmoid(b − logSNR) on ‖ε̂ − ε‖². Kingma and Gao,
    *Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation* (arXiv 2303.00848);
    Hoogeboom et al., *Simpler Diffusion* (arXiv 2410.19324). Both papers integrate it over logSNR, not over t:
    that is `OverLogSNR` of it. Equals `SoftMinSNR` with γ = e^b, and tends to `Unit` × ε as b grows.

    Use it when the resolution grows: lower b by 2·log 2 for every doubling, as the details' noise level moves.

    Arguments:
        bias: b, the logSNR at which half of the noise error's weight is left.
    """

    def __init__(self, bias: float = 2.0) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        logsnr = denoiser.schedule.logsnr(t)
        return torch.exp(logsnr + torch.nn.functional.logsigmoid(self.bias - logsnr))
