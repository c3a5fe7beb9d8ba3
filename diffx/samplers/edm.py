"""EDM's sampler."""

import math
from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, forward_variance, is_pure_noise, rho, sqrt, where
from diffx.samplers.between import at_times, times_at
from diffx.samplers.phi import exp
from diffx.schedules import NoiseLevel


class EDMHeun(Sampler):
    r"""EDM's sampler: Heun's method in x/α and σ/α, after new noise has raised σ/α a little.

    With y = x/α and ρ = σ/α, dy/dρ = (y − x̂)/ρ from (1 + γ)·ρ_t to ρ_s, γ = min(S_churn/K, √2 − 1) where ρ lies in
    [S_min, S_max], else 0. Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models* (arXiv
    2206.00364), Alg. 2, which is Alg. 1 for S_churn = 0. In y and ρ it is the same sampler on every schedule; `Heun`
    integrates in the schedule's own time instead. Noise is raised at most to the schedule's noisy end. From pure noise
    (α = 0), where ρ is infinite, the trapezoid is one in 1/ρ. Two denoiser calls per step, one in a step to the clean
    end, which is x̂ itself. Use it when a second-order solver shall do well on any schedule (S_churn = 0), or when many
    evaluations are to mend the model's errors (S_churn > 0).

    Arguments:
        S_churn: how much noise is renewed over all steps, ≥ 0.
        S_min: the smallest σ/α at which it is.
        S_max: the largest.
        S_noise: standard deviation of the new noise; a little above 1 makes up for detail that the model removes.
    """

    order = 2
    evaluations = 2

    def __init__(self, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0) -> None:
        self.S_churn = S_churn
        self.S_min = S_min
        self.S_max = S_max
        self.S_noise = S_noise

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> list[NoiseLevel]:
        """The raised levels from which the steps start."""
        grid = levels[:-1]
        if self.S_churn == 0:
            return grid
        raised = 2 * math.log1p(min(self.S_churn / len(grid), math.sqrt(2) - 1))
        times = times_at(denoiser.schedule, [t.logsnr - raised for t in grid])
        churned = [(rho(t) >= self.S_min) & (rho(t) <= self.S_max) for t in grid]
        times = [where(inside, time, t.time) for inside, time, t in zip(churned, times, grid, strict=True)]
        return at_times(denoiser.schedule, times, grid[0])

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: list[NoiseLevel],
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, list[NoiseLevel]]:
        raised, rest = state[0], state[1:]
        if isinstance(t.time, Tensor) or raised.time > t.time:
            x_t, t = self._churn(x_t, t, raised, noise), raised
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, rest
        ratio = s.sigma / t.sigma
        gain = s.alpha - ratio * t.alpha
        w = where(s.sigma == 0, 0.0, gain / 2 * exp(where(is_pure_noise(t), 0.0, (s.logsnr - t.logsnr) / 2)))
        x_hat_s = denoiser.at(s)(combined((ratio, x_t), (gain, x_hat)), s.t, **cond)
        return combined((ratio, x_t), (gain - w, x_hat), (w, x_hat_s)), rest

    def _churn(self, x_t: Tensor, t: NoiseLevel, raised: NoiseLevel, noise: Callable[..., Tensor]) -> Tensor:
        """x_t with noise up to the raised level; where that is t, as it was."""
        if self.S_churn == 0:
            return x_t
        same = raised.time <= t.time
        scale = where(same, 1.0, raised.alpha / t.alpha)
        variance = where(same, 0.0, forward_variance(raised, t))
        return combined((scale, x_t), (self.S_noise * sqrt(variance), noise()))
