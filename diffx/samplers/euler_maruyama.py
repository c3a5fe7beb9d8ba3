"""The reverse SDE by the Euler-Maruyama method."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, is_pure_noise, sqrt, where
from diffx.schedules import NoiseLevel


class EulerMaruyama(Sampler):
    r"""The Euler-Maruyama method on the reverse SDE, in the schedule's own time.

    x_s = x_t + (s − t)·(f·x_t − g²·score) + g·√(t − s)·z, with f = α̇/α, g² = 2σ·(σ̇ − f·σ) and score = (α·x̂ − x_t)/σ².
    Song et al., *Score-Based Generative Modeling through SDEs* (arXiv 2011.13456), Eq. 6; f and g from Kingma et al.
    (arXiv 2107.00630). From pure noise (α = 0), where f is infinite, the step is ancestral,
    α_s·x̂ + σ_s·z; one to the clean end is x̂ itself. Use it when results of the SDE papers are to be reproduced: `DDPM`
    needs fewer steps for the same SDE.
    """

    order = 1

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
        ratio, gain, variance = coefficients(t, s)
        mean = (ratio, x_t), (gain, x_hat)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return combined(*mean), None
        return combined(*mean, (sqrt(variance), noise())), None


def coefficients(t: NoiseLevel, s: NoiseLevel) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """What multiplies x_t and x̂, and the variance of the noise."""
    if not isinstance(t.alpha, Tensor):
        if s.sigma == 0:
            return 0.0, 1.0, 0.0
        if is_pure_noise(t):
            return 0.0, s.alpha, s.sigma**2
    h, f, of_sigma = s.time - t.time, t.d_alpha / t.alpha, t.d_sigma / t.sigma
    ratio, gain = 1 + h * (2 * of_sigma - f), 2 * h * t.alpha * (f - of_sigma)
    variance = -2 * h * t.sigma**2 * (of_sigma - f)
    clean, pure = s.sigma == 0, is_pure_noise(t)
    return (
        where(clean | pure, 0.0, ratio),
        where(clean, 1.0, where(pure, s.alpha, gain)),
        where(clean, 0.0, where(pure, s.sigma**2, variance)),
    )
