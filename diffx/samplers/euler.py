"""Euler's method on the probability-flow ODE."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, where
from diffx.schedules import NoiseLevel


class Euler(Sampler):
    r"""Euler's method on the probability-flow ODE, in the schedule's own time.

    x_s = x_t + (s − t)·dx/dt, with dx/dt = α̇·x̂ + σ̇·(x_t − α·x̂)/σ. Song et al. (arXiv 2011.13456), Eq. 13; Karras et al.
    (arXiv 2206.00364), Eq. 4. On the EDM and flow schedules it equals DDIM with η = 0, which is Euler's method in x/α
    and σ/α on every schedule. Elsewhere few steps give other samples: a schedule's own time is a poor variable where σ
    grows geometrically (`ve`), and may be a good one where the variance is preserved. A step to the clean end is x̂
    itself. Use it when a flow-matching model is sampled, or when the effect of a schedule's own time is the question.
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
        of_x, of_x_hat = derivative(t)
        h = s.time - t.time
        clean = s.sigma == 0
        return combined((where(clean, 0.0, 1 + h * of_x), x_t), (where(clean, 1.0, h * of_x_hat), x_hat)), None


def derivative(t: NoiseLevel) -> tuple[Any, Any]:
    """dx/dt = a·x_t + b·x̂ at a noise level with σ > 0: the coefficients a = σ̇/σ and b = α̇ − α·σ̇/σ."""
    of_x = t.d_sigma / t.sigma
    return of_x, t.d_alpha - t.alpha * of_x
