"""Denoising diffusion implicit models."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, ancestral, combined, sqrt
from diffx.schedules import NoiseLevel


class DDIM(Sampler):
    r"""Denoising diffusion implicit models: the first-order solver, with as much ancestral noise as wanted.

    x_s = α_s·x̂ + √(σ_s² − η²·σ̃²)·ẑ + η·σ̃·z, with ẑ = (x_t − α_t·x̂)/σ_t and σ̃² the posterior variance. Song et al.,
    *Denoising Diffusion Implicit Models* (arXiv 2010.02502), Eqs. 12 and 16, for any α and σ. η = 0 is deterministic,
    the first-order exponential integrator of the probability-flow ODE: Euler's method in y = x/α and ρ = σ/α, and on
    the flow schedule in its own time too. η = 1 is ancestral sampling with the smaller variance, k-diffusion's
    `euler_ancestral`. Use it when samples shall be an invertible function of their noise (η = 0), or as the baseline.

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
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        ratio, variance, _ = ancestral(t, s, self.eta)
        mean = (ratio, x_t), (s.alpha - ratio * t.alpha, x_hat)
        if self.eta == 0:
            return combined(*mean), None
        return combined(*mean, (sqrt(variance), noise())), None
