"""Multistep methods on the noise estimate."""

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, where
from diffx.samplers.phi import weights
from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import DiffxError


class Memory(NamedTuple):
    """The weights of the steps to come, and the ε̂ of the steps before, the last one first."""

    plan: list[list[Any]]
    past: tuple[Tensor, ...]


class AdamsBashforth(Sampler):
    r"""A multistep method on the noise estimate, in the variable that makes the schedule disappear.

    y_s = y_t + ∫ P dρ, with y = x/α and ρ = σ/α, since dy/dρ = ε̂ whatever the schedule; P is the polynomial through ε̂
    now and in the steps before, and methods differ in the variable in which it is one. The first steps know fewer
    estimates and take lower orders: the very first one leaves an error of O(h²), so that the whole is of second order
    at most, however small its errors. A step to the clean end is x̂ itself.

    Arguments:
        order: p, the number of estimates: p − 1 is the degree of P.
    """

    def __init__(self, order: int) -> None:
        if order < 1:
            raise DiffxError(f"sampler.order={order} is no number of estimates; take 1 to 4")
        self.estimates = order
        self.order = min(order, 2)

    @abstractmethod
    def variable(self, level: NoiseLevel) -> Any:
        """The variable of the polynomial."""

    @abstractmethod
    def moments(self, schedule: Schedule, steps: list[tuple[NoiseLevel, NoiseLevel]]) -> list[list[Any]]:
        """∫ u^i dρ over each step, i < p, where u runs from 0 to 1, linear in the variable."""

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Memory:
        plan = []
        for k, moments in enumerate(self.moments(denoiser.schedule, list(pairwise(levels)))):
            known = levels[max(0, k + 1 - self.estimates) : k + 1][::-1]
            here, there = self.variable(levels[k]), self.variable(levels[k + 1])
            plan.append(weights([(self.variable(level) - here) / (there - here) for level in known], moments)[1:])
        return Memory(plan, ())

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
        x_s = combine(x_t, x_hat, t, s, state.plan[0], state.past)
        eps = combined((1 / t.sigma, x_t), (-t.alpha / t.sigma, x_hat))
        return x_s, Memory(state.plan[1:], (eps, *state.past)[: self.estimates - 1])


def combine(
    x_t: Tensor, x_hat: Tensor, t: NoiseLevel, s: NoiseLevel, weights: list[Any], others: tuple[Tensor, ...]
) -> Tensor:
    """y_s = y_t + (ρ_s − ρ_t)·ε̂ + Σ_j w_j·(ε̂_j − ε̂), without a division by α_t: it may be 0 if there are no w_j."""
    scaled = [where(s.sigma == 0, 0.0, s.alpha * w) for w in weights]
    of_x = (s.sigma - sum(scaled)) / t.sigma
    return combined((of_x, x_t), (s.alpha - of_x * t.alpha, x_hat), *zip(scaled, others, strict=True))
