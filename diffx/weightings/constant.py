"""The error of the denoised estimate itself."""

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class Constant(Weighting):
    r"""The squared error of x̂, whatever the network predicts.

    w = 1. Salimans and Ho (arXiv 2202.00512), Sec. 4. Equals `Unit` × x0.

    Use it when all noise levels shall count by the error of the image they give.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return torch.ones_like(t)
