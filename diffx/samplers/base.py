"""The one loop of all samplers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.schedules import NoiseLevel

Noise = Callable[..., Tensor]
"""`noise(step, draw=0)` gives standard normal numbers of the shape of x_t; within a step, `noise(draw=0)`."""


class Sampler(ABC):
    """A solver with frozen hyper-parameters.

    A new sampler writes `step`, and `init` where it keeps a state. Solvers need the denoised estimate and the noise
    levels only; guidance, conditions and parameterizations are the denoiser's business.

    Attributes:
        order: the order of convergence in the largest step; strong order on the probability-flow ODE for deterministic
            samplers, weak order for stochastic ones.
        evaluations: denoiser calls per step; a last step to the clean end takes one.
    """

    order: ClassVar[int]
    evaluations: ClassVar[int] = 1

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Any:
        """The state before the first step; none unless a sampler keeps one.

        Arguments:
            denoiser: the denoiser that will be sampled.
            levels: the K + 1 noise levels of the grid.
        """
        return None

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Any,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Any]:
        """One step from t to s < t.

        Arguments:
            denoiser: the denoiser.
            x_t: samples at t, `[B, *]`.
            t: the noise level now, of numbers or, where each sample has its own time, of tensors `[B, 1, …, 1]`.
            s: the noise level after the step, likewise.
            state: what the step before returned, or `init`.
            noise: `noise(draw=0)` gives standard normal numbers `[B, *]`; called only where noise is added.
            cond: conditions for the denoiser.

        Returns:
            The samples at s, `[B, *]`, and the state for the next step.
        """

    def trajectory(
        self, denoiser: Denoiser, x: Tensor, times: Tensor, *, noise: Noise, **cond: Tensor
    ) -> Iterator[Tensor]:
        """The samples after each step.

        Arguments:
            denoiser: the denoiser.
            x: samples at `times[0]`, `[B, *]`.
            times: the grid, strictly decreasing, `[K + 1]`.
            noise: `noise(step, draw=0)` gives standard normal numbers `[B, *]`.
            cond: conditions for the denoiser.

        Yields:
            K times the samples `[B, *]`, the last at `times[-1]`.
        """
        # all noise levels before the loop: no schedule evaluation and no device synchronisation per step
        levels = denoiser.schedule.levels(times.to(x.device, x.dtype if x.dtype == torch.float64 else torch.float32))
        state = self.init(denoiser, levels)
        for k in range(len(levels) - 1):
            x, state = self.step(denoiser, x, levels[k], levels[k + 1], state, noise=partial(noise, k), **cond)
            yield x

    def __call__(self, denoiser: Denoiser, x: Tensor, times: Tensor, *, noise: Noise, **cond: Tensor) -> Tensor:
        """The samples at the end of the grid, `[B, *]`; arguments as for `trajectory`."""
        for x in self.trajectory(denoiser, x, times, noise=noise, **cond):  # noqa: B007, B020
            pass
        return x

    def nfe(self, steps: int) -> int:
        """Denoiser calls for a grid of `steps` steps that ends clean (guidance may double the network's)."""
        return (steps - 1) * self.evaluations + 1


def sqrt(value: float | Tensor) -> Any:
    """√max(value, 0) of a number or a tensor: rounding may leave a variance of −1e-17."""
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def where(condition: bool | Tensor, value: Any, otherwise: Any) -> Any:
    """`torch.where` for numbers too."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, otherwise)
    return value if condition else otherwise


def forward_variance(t: NoiseLevel, s: NoiseLevel) -> Any:
    """σ²_{t|s} = σ_t² − (α_t/α_s)²·σ_s², the variance of x_t given x_s (arXiv 2107.00630, Eq. 26)."""
    return t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
