"""EDM2's learned weighting."""

from torch import Tensor, nn

from diffx.denoisers import Preconditioned
from diffx.nn import sinusoids, zeros
from diffx.weightings.base import Weighting


class LearnedUncertainty(Weighting):
    r"""A weighting divided by the loss that is expected at each noise level, which is learned alongside.

    w = w₀·e^{−u}, with u added to the loss: w₀·e^{−u}·‖x̂ − x‖² + u. For a given noise level its minimum over u is
    e^u = E[w₀·‖x̂ − x‖²], so that all noise levels end up with a weighted error of 1. Karras et al., *Analyzing and
    Improving the Training Dynamics of Diffusion Models* (arXiv 2312.02696), Eqs. 14, 15 and 21, where w₀ is `EDM`; u is
    one linear layer on sinusoids of the logSNR, and starts at 0, that is with w₀. Scaling w₀ changes nothing but u.

    Use it when the loss still differs between noise levels after preconditioning, and the density of times shall
    decide alone what is trained most.

    Arguments:
        weighting: w₀.
        features: the number of sinusoids; even.
    """

    def __init__(self, weighting: Weighting, features: int = 128) -> None:
        super().__init__()
        self.weighting = weighting
        self.features = features
        self.uncertainty = zeros(nn.Linear(features, 1))

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return self.weighting(denoiser, t) * (-self._u(denoiser, t)).exp()

    def penalty(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return self.weighting.penalty(denoiser, t) + self._u(denoiser, t)

    def _u(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        # a learned schedule has no part in this: u tells how large the loss is, not where the times should be
        features = sinusoids(denoiser.schedule.logsnr(t).detach(), self.features)
        weight, bias = self.uncertainty.weight, self.uncertainty.bias
        # not the layer itself, which autocast would run in reduced precision
        return (features * weight.to(features.dtype)).sum(1) + bias.to(features.dtype)
