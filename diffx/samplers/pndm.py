"""Pseudo numerical methods."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.adams_bashforth import combine
from diffx.samplers.base import Sampler, combined, is_pure_noise, rho, where
from diffx.samplers.between import at_times
from diffx.schedules import NoiseLevel

OF_PAST = (-59 / 24, 37 / 24, -9 / 24)
"""Adams and Bashforth's fourth-order weights for equal steps, of ε̂ in the steps before; now it has 55/24."""


class Memory(NamedTuple):
    """The middles in time of the first steps, and the ε̂ of the steps before, the last one first."""

    middles: tuple[NoiseLevel, ...]
    past: tuple[Tensor, ...]


class PNDM(Sampler):
    r"""PNDM, linear multistep of fourth order put to DDIM's step, after three steps of Runge and Kutta.

    DDIM with ε̂′ = (55·ε̂ − 59·ε̂₁ + 37·ε̂₂ − 9·ε̂₃)/24 in the place of ε̂, the estimates of three steps before. Liu et al.,
    *Pseudo Numerical Methods for Diffusion Models on Manifolds* (arXiv 2202.09778), Eqs. 11 to 13 and F-PNDM's
    algorithm. The weights are of fourth order for equal steps; DDIM's step makes the whole of second order. Uneven
    grids must be smooth functions of the step's number. The first three steps take four denoiser calls each; one to
    the clean end is x̂ itself. Use it when a published result was sampled so: `DEIS` and `UniPC` need fewer evaluations.
    """

    order = 2
    warm_up = (4, 4, 4)

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Memory:
        first = list(pairwise(levels))[: len(self.warm_up)]
        middles = at_times(denoiser.schedule, [(t.time + s.time) / 2 for t, s in first], levels[0])
        return Memory(tuple(middles), ())

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Memory,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Memory]:
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, state
        eps = noise_estimate(x_t, x_hat, t)
        if state.middles:
            x_s = runge_kutta(denoiser, cond, x_t, x_hat, t, state.middles[0], s)
        else:
            x_s = combine(x_t, x_hat, t, s, [(rho(s) - rho(t)) * c for c in OF_PAST], state.past)
        return x_s, Memory(state.middles[1:], (eps, *state.past)[:3])


def noise_estimate(x_t: Tensor, x_hat: Tensor, t: NoiseLevel) -> Tensor:
    """ε̂ = (x_t − α_t·x̂)/σ_t, and anything finite at the clean end."""
    sigma_t = where(t.sigma == 0, 1.0, t.sigma)
    return combined((1 / sigma_t, x_t), (-t.alpha / sigma_t, x_hat))


def runge_kutta(
    denoiser: Denoiser,
    cond: dict[str, Tensor],
    x_t: Tensor,
    x_hat: Tensor,
    t: NoiseLevel,
    m: NoiseLevel,
    s: NoiseLevel,
) -> Tensor:
    """The classical method of four stages, each an estimate ε̂ for a step of DDIM from t (Eq. 13)."""

    def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
        return noise_estimate(x, denoiser.at(level)(x, level.t, **cond), level)

    # from pure noise, where no ε̂ but its own can be put to DDIM's step, all stages are DDIM
    to_m, to_s = (where(is_pure_noise(t), 0.0, rho(level) - rho(t)) for level in (m, s))
    eps_1 = estimate(combine(x_t, x_hat, t, m, [], ()), m)
    eps_2 = estimate(combine(x_t, x_hat, t, m, [to_m], (eps_1,)), m)
    eps_3 = estimate(combine(x_t, x_hat, t, s, [to_s], (eps_2,)), s)
    return combine(x_t, x_hat, t, s, [to_s / 3, to_s / 3, to_s / 6], (eps_1, eps_2, eps_3))
