"""The straight path of flow matching."""

from torch import Tensor

from diffx.schedules.base import Schedule
from diffx.utils import DiffxError


class Flow(Schedule):
    r"""The straight path from data to noise, of rectified flow and flow matching.

    α(t) = 1 − (1 − α_min)·t, σ(t) = t. Lipman et al., *Flow Matching for Generative Modeling* (arXiv 2210.02747),
    Eq. 20 with σ_min = 0 and time reversed; Liu et al., *Flow Straight and Fast* (arXiv 2209.03003). With α_min = 0,
    as in the papers, ε-prediction is undefined at t = 1. Use it when a flow-matching model is trained
    (parameterization=flow), or few steps of Euler's method shall do; flow_clipped where ε-prediction is to be compared
    on it.

    Arguments:
        alpha_min: α(1), in [0, 1).
    """

    def __init__(self, alpha_min: float = 0.0) -> None:
        super().__init__()
        if not 0 <= alpha_min < 1:
            raise DiffxError(f"alpha_min={alpha_min} is not in [0, 1); the papers have 0")
        self.alpha_min = alpha_min

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - (1 - self.alpha_min) * t, t.clone()

    def inverse(self, logsnr: Tensor) -> Tensor:
        return (1 / ((logsnr / 2).exp() + 1 - self.alpha_min)).clamp(max=1.0)
