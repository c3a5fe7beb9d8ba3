"""Steps of a size that the error chooses."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler
from diffx.samplers.phi import phi
from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import DiffxError, expand_as

SMALLEST = 1e-7
"""A step in log(α/σ) below which the tolerance cannot be met."""


class Adaptive(Sampler):
    r"""Steps as long as each sample's error allows, by an exponential Runge-Kutta pair of orders 3 and 2.

    In λ = log(α/σ) and h = λ_s − λ_t, with estimates x̂_m and x̂_n at a third and two thirds of the way:
    x_s = (σ_s/σ_t)·x_t + α_s·h·(φ_1(−h)·x̂ + φ_2(−h)·(x̂_n − x̂)·3/2), from which the second-order result differs by
    α_s·h·φ_2(−h)·(x̂_n − 2·x̂_m + x̂)·3/2: the adaptive pair of *DPM-Solver* (arXiv 2206.00927), on x̂ instead of ε̂. A
    step is accepted where √mean((difference/δ)²) ≤ 1, δ = max(atol, rtol·|x|), and the next one is 0.9·error^{−1/3}
    times as long, sample by sample: Jolicoeur-Martineau et al., *Gotta Go Fast* (arXiv 2105.14080), Alg. 1. Errors are
    those of x/√(α² + σ²), so that every schedule takes the same steps in logSNR. The grid's times are all met, one step
    in the grid is enough; a step to the clean end goes down to σ/α = rho_min, from which x̂ is the end. Samples that are
    done cost nothing: evaluations per sample are a mean, measured by `Counted`. Use it when the right number of steps
    is not known, or as a reference.

    Arguments:
        rtol: relative tolerance of a step, > 0.
        atol: absolute tolerance, > 0; half a step of 8 bits on [−1, 1] is 0.0039.
        h_first: the first step tried, in log(α/σ), > 0.
        rho_min: the σ/α that counts as clean, > 0.
    """

    order = 3
    evaluations = None

    def __init__(self, rtol: float = 0.05, atol: float = 0.0078, h_first: float = 0.05, rho_min: float = 0.002) -> None:
        self.rtol = rtol
        self.atol = atol
        self.h_first = h_first
        self.rho_min = rho_min

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Tensor | None,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Tensor]:
        like = x_t.new_ones(len(x_t), dtype=torch.float64)
        at, end, clean = (like * _flat(value) for value in (t.logsnr / 2, s.logsnr / 2, s.sigma == 0))
        end = torch.where(clean > 0, -math.log(self.rho_min), end)
        h, x = self.h_first * like if state is None else state, x_t
        while len(rows := (at < end).nonzero()[:, 0]):
            left = end[rows] - at[rows]
            size = torch.minimum(h[rows], left)
            some = {name: value[rows] for name, value in cond.items()}
            new, error = self._try(denoiser, x[rows], at[rows], size, t.t.dtype, some)
            proposed = size * (0.9 * error ** (-1 / 3)).clamp(0.2, 5.0)
            accepted = error <= 1
            # a step cut short by the grid says nothing against the longer one
            cut = accepted & (size < h[rows])
            h = h.index_put((rows,), torch.where(cut, torch.maximum(proposed, h[rows]), proposed))
            reached = torch.where(size == left, end[rows], at[rows] + size)
            at = at.index_put((rows,), torch.where(accepted, reached, at[rows]))
            x = x.index_put((rows[accepted],), new[accepted])
            if not (h > SMALLEST).all():
                raise DiffxError(
                    "the adaptive sampler's steps have become too short: the denoiser is not finite, or the tolerance "
                    "is below its rounding; raise sampler.rtol and sampler.atol"
                )
        rows = clean.nonzero()[:, 0]
        if len(rows):
            times, _, _ = _levels(denoiser.schedule, at[rows], t.t.dtype)
            some = {name: value[rows] for name, value in cond.items()}
            x = x.index_put((rows,), denoiser(x[rows], times, **some))
        return x, h

    def _try(
        self, denoiser: Denoiser, x: Tensor, at: Tensor, h: Tensor, dtype: torch.dtype, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A step of h `[B]` from λ = `at` `[B]`: the third-order result `[B, *]`, and its error in tolerances `[B]`."""
        lambdas = torch.cat([at, at + h / 3, at + 2 * h / 3, at + h])
        times, alpha, sigma = (value.chunk(4) for value in _levels(denoiser.schedule, lambdas, dtype))

        def scaled(coefficient: Tensor, of: Tensor) -> Tensor:
            return expand_as(coefficient, of).to(of.dtype) * of

        def first_order(k: int) -> Tensor:
            ratio = sigma[k] / sigma[0]
            return scaled(ratio, x) + scaled(alpha[k] - ratio * alpha[0], x_hat)

        x_hat = denoiser(x, times[0], **cond)
        x_hat_m = denoiser(first_order(1), times[1], **cond)
        curved = scaled(alpha[2] * 4 * h / 3 * phi(2, -2 * h / 3), x_hat_m - x_hat)
        x_hat_n = denoiser(first_order(2) + curved, times[2], **cond)
        gain = alpha[3] * 1.5 * h * phi(2, -h)
        x_s = first_order(3) + scaled(gain, x_hat_n - x_hat)
        before, after = (1 / torch.hypot(alpha[k], sigma[k]) for k in (0, 3))
        difference = scaled(after * gain, x_hat_n - 2 * x_hat_m + x_hat)
        size = torch.maximum(scaled(before, x.abs()), scaled(after, x_s.abs()))
        tolerance = (self.rtol * size).clamp(min=self.atol)
        return x_s, (difference / tolerance).double().square().flatten(1).mean(1).sqrt()


def _flat(value: Any) -> Any:
    """One value per sample, `[B]`, or one for all."""
    return value.reshape(-1) if isinstance(value, Tensor) else value


@torch.no_grad()
def _levels(schedule: Schedule, lambdas: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The times at log(α/σ) `[B]` as the denoiser takes them, and α and σ there in float64."""
    times = schedule.inverse(2 * lambdas.to(schedule.device)).to(lambdas.device, dtype)
    alpha, sigma = schedule(times.to(schedule.device, torch.float64))
    return times, alpha.to(lambdas.device), sigma.to(lambdas.device)
