"""Velocity prediction of flow matching."""

from torch import Tensor

from diffx.parameterizations.base import Parameterization


class FlowVelocity(Parameterization):
    r"""The network predicts the velocity of the straight path, noise minus data.

    F = z − x: x̂ = (x_t − σ·F)/(α + σ). Lipman et al., *Flow Matching for Generative Modeling* (arXiv 2210.02747), Eq.
    23 with time reversed: there α + σ = 1 and u = dx_t/dt. For another schedule it is their u after x_t has been scaled
    to x_t/(α + σ). Use it when schedule=flow, or its variants.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_in = 1 / (alpha + sigma)
        return c_in, c_in, -sigma * c_in
