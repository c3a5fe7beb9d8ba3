"""The one loop of all samplers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.phi import exp
from diffx.schedules import LOGSNR_MAX, NoiseLevel

Noise = Callable[..., Tensor]
"""`noise(step, draw=0)` gives standard normal numbers of the shape of x_t; within a step, `noise(draw=0)`."""


class Sampler(ABC):
    """A solver with frozen hyper-parameters.

    A new sampler writes `step`, and `init` where it keeps a state. Solvers need the denoised estimate and the noise
    levels only; guidance, conditions and parameterizations are the denoiser's business.

    Attributes:
        order: the order of convergence in the largest step, its own start included; strong order on the
            probability-flow ODE for deterministic samplers, weak order for stochastic ones.
        evaluations: denoiser calls per step; a last step to the clean end takes one. None where a sampler finds its
            steps itself: `Counted` then counts the calls.
        warm_up: denoiser calls of each of the first steps, where they differ.
    """

    order: int
    evaluations: int | None = 1
    warm_up: ClassVar[tuple[int, ...]] = ()

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
        if self.evaluations is not None:  # else samples are at different steps, and some steps are taken back
            denoiser = denoiser.for_trajectory()
        # all noise levels before the loop: no schedule evaluation and no device synchronisation per step
        levels = denoiser.schedule.levels(times.to(x.device, x.dtype if x.dtype == torch.float64 else torch.float32))
        return self.steps(denoiser, x, levels, self.init(denoiser, levels), noise=noise, **cond)

    def steps(
        self, denoiser: Denoiser, x: Tensor, levels: list[NoiseLevel], state: Any, *, noise: Noise, **cond: Tensor
    ) -> Iterator[Tensor]:
        """The loop alone, in which nothing waits for the device unless a sampler finds its steps itself.

        Arguments:
            denoiser: the denoiser.
            x: samples at the first level, `[B, *]`.
            levels: the K + 1 noise levels of the grid.
            state: what `init` returned for them.
            noise: `noise(step, draw=0)` gives standard normal numbers `[B, *]`.
            cond: conditions for the denoiser.

        Yields:
            K times the samples `[B, *]`.
        """
        for k in range(len(levels) - 1):
            x, state = self.step(denoiser, x, levels[k], levels[k + 1], state, noise=partial(noise, k), **cond)
            yield x

    def __call__(self, denoiser: Denoiser, x: Tensor, times: Tensor, *, noise: Noise, **cond: Tensor) -> Tensor:
        """The samples at the end of the grid, `[B, *]`; arguments as for `trajectory`."""
        for x in self.trajectory(denoiser, x, times, noise=noise, **cond):  # noqa: B007, B020
            pass
        return x

    def nfe(self, steps: int) -> int | None:
        """Denoiser calls for a grid of `steps` steps that ends clean (guidance may double the network's).

        None where it is known afterwards only, by `Counted`.
        """
        if self.evaluations is None:
            return None
        first = self.warm_up[: steps - 1]
        return sum(first) + (steps - 1 - len(first)) * self.evaluations + 1


def combined(*terms: tuple[Any, Tensor]) -> Tensor:
    """Σ c·x, of a coefficient c, a number or a tensor that broadcasts, and a tensor x `[B, *]` per term, at least one.

    With numbers one pass over the memory per term and one new tensor in all.
    """
    (c, x), *others = terms
    total = c * x
    for c, x in others:
        total = total + c * x if isinstance(c, Tensor) else total.add_(x, alpha=c)
    return total


def sqrt(value: float | Tensor) -> Any:
    """√max(value, 0) of a number or a tensor: rounding may leave a variance of −1e-17."""
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def where(condition: bool | Tensor, value: Any, otherwise: Any) -> Any:
    """`torch.where` for numbers too."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, otherwise)
    return value if condition else otherwise


def is_pure_noise(t: NoiseLevel) -> Any:
    """Whether α is 0 there, or next to it: x_t/α and σ/α say nothing then."""
    return t.logsnr <= -LOGSNR_MAX


def rho(t: NoiseLevel) -> Any:
    """σ/α, bounded as logSNR is."""
    return exp(-t.logsnr / 2)


class Ancestral(NamedTuple):
    """A step down to a smaller noise level than that of s, from which noise leads up to it.

    Arguments:
        ratio: what a first-order step multiplies x_t by; x̂ has α_s − ratio·α_t.
        variance: of the noise added.
        logsnr: where the step ends before noise is added, within ±`LOGSNR_MAX`.
    """

    ratio: Any
    variance: Any
    logsnr: Any


def ancestral(t: NoiseLevel, s: NoiseLevel, eta: float) -> Ancestral:
    """A step of which η²·σ̃² is noise, σ̃² = σ²_{t|s}·σ_s²/σ_t² (arXiv 2010.02502, Eq. 16)."""
    if eta == 0:
        return Ancestral(s.sigma / t.sigma, 0.0, s.logsnr)
    variance = eta**2 * forward_variance(t, s) * (s.sigma / t.sigma) ** 2
    # σ of the level stepped down to, at the α of s; at η = 1 the difference loses no digits
    kept = s.sigma**2 * (1 - eta**2) + (eta * s.sigma**2 / t.sigma * t.alpha / s.alpha) ** 2
    down = sqrt(kept)
    return Ancestral(down / t.sigma, variance, 2 * log_ratio(s.alpha, down))


def diffusion(t: NoiseLevel, s: NoiseLevel, eta: float) -> tuple[Any, Any]:
    """The SDE with (1 + η²)/2·g² of drift: what multiplies x_t where x̂ stays, and the variance of the noise.

    σ_s/σ_t·e^{−ηh} and σ_s²·(1 − e^{−2ηh}), with e^{−h} = ρ_s/ρ_t; x̂ has α_s − ratio·α_t.
    """
    if eta == 0:
        return s.sigma / t.sigma, 0.0
    kept = (s.sigma * t.alpha / (s.alpha * t.sigma)) ** eta
    return s.sigma / t.sigma * kept, s.sigma**2 * (1 - kept**2)


def log_ratio(alpha: Any, sigma: Any) -> Any:
    """log(α/σ) of numbers or tensors, bounded as logSNR is."""
    bound = LOGSNR_MAX / 2
    if isinstance(sigma, Tensor):
        return (alpha.log() - sigma.log()).clamp(-bound, bound)
    return min(max(math.log(alpha / sigma), -bound), bound) if sigma > 0 else bound


def forward_variance(t: NoiseLevel, s: NoiseLevel) -> Any:
    """σ²_{t|s} = σ_t² − (α_t/α_s)²·σ_s², the variance of x_t given x_s (arXiv 2107.00630, App. A.1)."""
    return t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
