"""Grids regular in a function of the noise-to-signal ratio σ/α."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule


class Karras(Discretization):
    r"""Equal steps of a root of the noise level: EDM's grid.

    (σ/α)^{1/ρ} in equal steps from σ_max to σ_min, then to the end. Karras et al. (arXiv 2206.00364), Eq. 5; with α = 1
    the paper's own. Where the schedule ends inside [σ_min, σ_max], its end is taken.

    Use it when steps are few and of second order (Heun, DPM-Solver++), on any schedule.

    Arguments:
        rho: ρ > 0; larger values put more steps near the clean end.
        sigma_min: the smallest σ/α before the last step, > 0.
        sigma_max: the largest σ/α, > sigma_min.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.rho = rho
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        def spaced(first: Tensor, last: Tensor, n: int) -> Tensor:
            # lerp keeps both ends exact
            grid = torch.lerp(first ** (1 / self.rho), last ** (1 / self.rho), _unit_grid(n))
            return grid**self.rho

        return _through_sigma(schedule, steps, start, stop, self.sigma_min, self.sigma_max, spaced)


class LogSNR(Discretization):
    r"""Equal steps of logSNR: the geometric grid.

    logSNR from σ/α = σ_max to σ_min, then to the end. Lu et al., *DPM-Solver* (arXiv 2206.00927), Sec. 3.4. It is the
    "exponential" grid of k-diffusion and diffusers, log σ in equal steps, and the limit of `Karras` for ρ → ∞. Where
    the schedule ends inside [σ_min, σ_max], its end is taken.

    Use it when the sampler integrates over logSNR exactly, as DPM-Solver and DDIM do.

    Arguments:
        sigma_min: the smallest σ/α before the last step, > 0.
        sigma_max: the largest σ/α, > sigma_min.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        def spaced(first: Tensor, last: Tensor, n: int) -> Tensor:
            return torch.lerp(first.log(), last.log(), _unit_grid(n)).exp()

        return _through_sigma(schedule, steps, start, stop, self.sigma_min, self.sigma_max, spaced)


def _unit_grid(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _through_sigma(
    schedule: Schedule,
    steps: int,
    start: float,
    stop: float,
    sigma_min: float,
    sigma_max: float,
    spaced: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Times of a grid in σ/α. A clean end below σ_min is not part of the grid but one step beyond it."""
    with torch.no_grad():
        ends = torch.tensor([start, stop], dtype=torch.float64)
        first, last = torch.exp(-schedule.logsnr(ends.to(schedule.device)) / 2).cpu().unbind()
        beyond = bool(last < sigma_min) and bool(first > sigma_min)
        # a grid wholly above σ_max has no other start than its own
        clipped = bool(first > sigma_max) and bool(last < sigma_max)
        sigma = spaced(
            first.clamp(max=sigma_max) if clipped else first,
            last.clamp(min=sigma_min) if beyond else last,
            steps if beyond else steps + 1,
        )
        times = schedule.inverse(-2 * sigma.log().to(schedule.device)).cpu()
    if not clipped:
        times[0] = start
    return torch.cat([times, ends[1:]]) if beyond else torch.cat([times[:-1], ends[1:]])
