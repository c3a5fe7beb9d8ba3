"""Ancestral sampling."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, forward_variance, sqrt, where
from diffx.schedules import NoiseLevel


class DDPM(Sampler):
    r"""x_s ~ N(posterior mean of x_s given x_t and x̂, variance between the two bounds).

    Ho et al., *Denoising Diffusion Probabilistic Models* (arXiv 2006.11239), Eqs. 6 and 7 and Alg. 2, for any α and σ.
    Both of the paper's fixed variances are ends of IDDPM's interpolation (arXiv 2102.09672, Eq. 15):
    exp(v·log β + (1 − v)·log β̃), with β = σ²_{t|s} and β̃ = β·σ_s²/σ_t². No noise is added in a step to the clean end.

    Arguments:
        v: 0 for the smaller variance β̃ (exact for data at one point), 1 for the larger β (exact for data ~ N(0, I)).
    """

    order = 1

    def __init__(self, v: float = 0.0) -> None:
        self.v = v

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
        return ancestral_step(x_t, denoiser.at(t)(x_t, t.t, **cond), t, s, self.v, noise), None


def ancestral_step(
    x_t: Tensor, x_hat: Tensor, t: NoiseLevel, s: NoiseLevel, v: float | Tensor, noise: Callable[..., Tensor]
) -> Tensor:
    """x_s from x_t, given x̂ and the place v of the variance between its bounds, a number or `[B, *]`."""
    beta = forward_variance(t, s)
    ratio = s.sigma / t.sigma
    mean = (t.alpha / s.alpha * ratio**2, x_t), (s.alpha * beta / t.sigma**2, x_hat)
    if not isinstance(s.sigma, Tensor) and s.sigma == 0:
        return combined(*mean)
    # at the clean end of a sample 0^0 = 1 would add noise, and a learned v above 1 infinitely much
    std = where(s.sigma > 0, sqrt(beta) * ratio ** (1 - v), 0.0)
    return combined(*mean, (std, noise()))
