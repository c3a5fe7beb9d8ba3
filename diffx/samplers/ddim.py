"""Denoising diffusion implicit models."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, forward_variance, sqrt
from diffx.schedules import NoiseLevel


class DDIM(Sampler):
    r"""x_s = α_s·x̂ + √(σ_s² − η²·σ̃²)·ẑ + η·σ̃·z, with ẑ = (x_t − α_t·x̂)/σ_t and σ̃² the posterior variance.

    Song et al., *Denoising Diffusion Implicit Models* (arXiv 2010.02502), Eqs. 12 and 16, for any α and σ. η = 0 is
    deterministic, the first-order exponential integrator of the probability-flow ODE; on the flow schedule it is
    Euler's method. η = 1 is ancestral sampling with the smaller variance.

    Arguments:
        eta: η ∈ [0, 1].
    """

    order = 1

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: None,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, None]:
        x_hat = denoiser(x_t, t.t, **cond)
        added = self.eta**2 * forward_variance(t, s) * (s.sigma / t.sigma) ** 2
        ratio = sqrt(s.sigma**2 - added) / t.sigma
        x_s = ratio * x_t + (s.alpha - ratio * t.alpha) * x_hat
        if self.eta > 0:
            x_s = x_s + sqrt(added) * noise()
        return x_s, None
