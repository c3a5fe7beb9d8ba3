"""Flow matching's weighting."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class FlowMatching(Weighting):
    r"""The squared error of flow matching's velocity, whatever the network predicts.

    w = (1 + √SNR)², on the flow schedule 1/t², since û − u = (x − x̂)/t for u = z − x. Lipman et al., *Flow Matching for
    Generative Modeling* (arXiv 2210.02747), Eq. 23 with time reversed; on another schedule, their loss after x_t has
    been scaled to x_t/(α + σ). Equals `Unit` × flow on every schedule.

    Use it when a network that predicts something else than the velocity shall be trained on the flow-matching loss.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return (1 + torch.exp(denoiser.schedule.logsnr(t) / 2)) ** 2
