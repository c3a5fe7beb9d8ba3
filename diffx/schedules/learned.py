"""VDM's learned schedule."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffx.schedules.base import Schedule


class Learned(Schedule):
    r"""A schedule that is trained with the denoiser: variance preserving, a monotone network of the time.

    −logSNR(t) = γ_0 + (γ_1 − γ_0)·(g(t) − g(0))/(g(1) − g(0)), where g(t) = a·t + Σ_k c_k·S(b_k·(t − m_k)) has
    positive a, b, c and S is the logistic function. Kingma et al., *Variational Diffusion Models* (arXiv 2107.00630),
    Sec. 3.2 and App. H. It begins nearly linear in logSNR. Use it when the variational bound is trained
    (objective=elbo): any other loss would move the schedule to where that loss is small.

    Arguments:
        logsnr_max: −γ_0, the logSNR at t = 0; noise below half a step of 8-bit pixels from about 12 on.
        logsnr_min: −γ_1, the logSNR at t = 1, < logsnr_max.
        learn_ends: whether γ_0 and γ_1 are learned too.
        hidden: the number of logistic functions.
    """

    def __init__(
        self, logsnr_max: float = 13.3, logsnr_min: float = -5.0, learn_ends: bool = False, hidden: int = 1024
    ) -> None:
        super().__init__()
        for name, value in (("gamma_0", -logsnr_max), ("gamma_1", -logsnr_min)):
            if learn_ends:
                self.register_parameter(name, nn.Parameter(torch.tensor(value)))
            else:
                self.register_buffer(name, torch.tensor(value))
        self.gamma_0: Tensor
        self.gamma_1: Tensor
        # before softplus; at first all slopes are alike and the steps evenly spaced
        self.slope = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))
        self.height = nn.Parameter(torch.full((hidden,), _inverse_softplus(1.0)))
        self.steepness = nn.Parameter(torch.full((hidden,), _inverse_softplus(10.0)))
        self.middle = nn.Parameter((torch.arange(hidden) + 0.5) / hidden)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # in float64: float32 cannot tell neighbouring times by their logSNR
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)
        g_0, g_1 = self._rise(ends).unbind()
        share = (self._rise(t.to(torch.float64)) - g_0) / (g_1 - g_0)
        # lerp would take the ends in float32
        gamma = self.gamma_0 * (1 - share) + self.gamma_1 * share
        return torch.sigmoid(-gamma).sqrt().to(t.dtype), torch.sigmoid(gamma).sqrt().to(t.dtype)

    def interior(self) -> list[nn.Parameter]:
        return [self.slope, self.height, self.steepness, self.middle]

    def _rise(self, t: Tensor) -> Tensor:
        """g(t), increasing; shape of t, float64."""
        slope, height, steepness, middle = (parameter.double() for parameter in self.interior())
        steps = torch.sigmoid(softplus(steepness) * (t[..., None] - middle))
        return softplus(slope) * t + (softplus(height) * steps).mean(-1)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
