"""The straight path of flow matching."""

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class Flow(Schedule):
    r"""The straight path from data to noise, of rectified flow and flow matching.

    α(t) = 1 − t, σ(t) = t. Lipman et al., *Flow Matching for Generative Modeling* (arXiv 2210.02747), Eq. 20 with
    σ_min = 0 and time reversed; Liu et al., *Flow Straight and Fast* (arXiv 2209.03003). α(1) = 0: ε-prediction is
    undefined there. Use it when a flow-matching model is trained (parameterization=flow), or few steps of Euler's
    method shall do.
    """

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t.clone()

    def inverse(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)
