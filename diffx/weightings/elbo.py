"""The variational bound, and weightings over logSNR instead of time."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class ELBO(Weighting):
    r"""The continuous-time variational bound on −log p(x), in nats per dimension.

    w = −½·dSNR/dt. Kingma et al., *Variational Diffusion Models* (arXiv 2107.00630), Eq. 16. With the times uniform on
    (0, 1), `low_discrepancy` as in the paper, the mean loss is the bound's diffusion term, which depends on the
    schedule through its end-points alone; another density of times makes it a weighted bound. Equals `OverLogSNR` of
    `SNR`.

    Use it when likelihood is the aim: it spends most of its weight on imperceptible noise levels.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return -0.5 * _derivative(lambda s: denoiser.schedule.logsnr(s).exp(), t)


class OverLogSNR(Weighting):
    r"""A weighting per unit of logSNR instead of per unit of time.

    w = −½·(dlogSNR/dt)·w₀, so that under uniform times the loss is ½·∫ w₀·‖x̂ − x‖² dlogSNR, and the schedule no longer
    matters. Kingma and Gao (arXiv 2303.00848), Sec. 3, where every objective is written like this. Of `SNR` it is the
    `ELBO`.

    Use it when a paper states its weight over logSNR, as VDM++ and Simpler Diffusion do for the sigmoid.

    Arguments:
        weighting: w₀.
    """

    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        slope = _derivative(denoiser.schedule.logsnr, t)
        return -0.5 * slope * self.weighting(denoiser, t)

    def penalty(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return self.weighting.penalty(denoiser, t)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of a function of time, `[B]`; it keeps its dependence on the parameters of a learned schedule."""
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=learning)
    # where α = 0 the bounded logSNR is constant, but its derivative is computed as 0/0
    return slope.nan_to_num(0.0)
