r"""Times fitted to a denoiser, a sampler and a number of steps.

The K times that K steps spend best are a small least-squares problem: few unknowns, and a residual for every dimension
of every sample. Minimised is the distance between the samples of the short grid and those of a long one from the same
noise, as Tong et al. propose in *Learning to Discretize Denoising Diffusion ODEs* (arXiv 2405.15506), who train the
times through the sampler. Here the derivatives are finite differences and the method is a trust-region Gauss–Newton
one, which needs nothing of a sampler but that it can be run: any deterministic solver, any guidance, no backward pass
through the network.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.discretizations import Discretization, Karras, LogSNR, Uniform
from diffx.samplers import DPMSolverPP2M, Sampler
from diffx.schedules import Schedule
from diffx.utils import DiffxError

NOISIEST, CLEANEST = -18.0, 18.0
"""The logSNR between which the times before the clean end are sought; beyond, nothing of x or of the noise is left."""

_GAP = 1e-4  # the smallest step, as a part of the range of logSNR: float32 must tell the times apart

_ENOUGH = 1e-3  # a step that lowers the mean square by less than this share is the last

HEURISTICS: dict[str, Discretization] = {"uniform": Uniform(), "karras": Karras(), "logsnr": LogSNR()}
"""The grids with which the result is compared."""

_FEW = 6  # so many times are worth finding half as many first

SHORTENED: dict[str, Discretization] = {
    f"{name} from sigma {high:g} to {low:g}": grid(sigma_min=low, sigma_max=high)
    for name, grid in (("logsnr", LogSNR), ("karras", Karras), ("karras rho=3", partial(Karras, 3.0)))
    for low in (0.002, 0.02, 0.05, 0.1)
    for high in (4.0, 10.0, 25.0, 80.0)
}
"""Grids that begin later and end earlier. Few times are sought from the best heuristic grid too: whether the first step
is spent on finding the mean of the data or saved is a choice that no small change undoes."""


class LearnedTimes(NamedTuple):
    """What a search found.

    Arguments:
        times: the grid on the denoiser's schedule, float64 `[K + 1]`, from noise to 0.
        logsnr: the noise levels of all times but the last, increasing, float64 `[K]`; what
            `diffx.discretizations.learned.save` writes.
        report: plain values: what the times were made for and how; `rms` has the root mean square error per dimension
            of the learned grid, of the heuristic ones and of the one the search started from, on samples that the
            search has not seen.
    """

    times: Tensor
    logsnr: Tensor
    report: dict[str, Any]


@torch.no_grad()
def learn_discretization(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    steps: int,
    *,
    reference_steps: int = 256,
    iterations: int = 20,
    batch_size: int = 256,
    on_iteration: Callable[[str], None] | None = None,
    **cond: Tensor,
) -> LearnedTimes:
    r"""Finds the times at which K steps of a sampler come nearest to the exact solution.

    min over logSNR_0 < … < logSNR_{K−1} of E‖x_K − x_ref‖², x_K the sample by K steps and x_ref that by many steps of
    DPM-Solver++, both from the same noise. Fitted to the first half of the noise and measured on the second. From six
    steps on, the times of half as many are found first, and the search starts from those and their midpoints: many
    times sought at once stop at poor minima. Deterministic. Takes at most 8/3·`iterations`·K² + 80·K +
    `reference_steps` denoiser calls per sample, twice that for solvers of two calls per step.

    Arguments:
        denoiser: the denoiser as it will be sampled: guided, thresholded, on the schedule to sample on.
        sampler: a deterministic sampler of the probability-flow ODE.
        noise: standard normal numbers `[N, *]`, N ≥ 2, on the device to sample on. A hundred images are plenty; of
            points in a few dimensions it takes a thousand, since the few that two modes pull at have most of the error.
        steps: K ≥ 1.
        reference_steps: steps of the reference.
        iterations: steps of the optimiser at most.
        batch_size: samples that go through the denoiser together.
        on_iteration: is told in words how far the search is.
        cond: conditions for the denoiser, each `[N, …]`.

    Returns:
        The times, their noise levels and a report.

    Raises:
        DiffxError: if the sampler is stochastic, or there are fewer than 2 samples.
    """
    if len(noise) < 2:
        raise DiffxError("learning times takes at least 2 samples, one to fit them to and one to measure them on")
    half = len(noise) // 2
    # before the long reference is made, one sample that finds out whether the sampler asks for noise
    probe = _Problem(denoiser, sampler, noise[:1], {k: v[:1] for k, v in cond.items()}, 1)
    probe.samples(sampler, Uniform()(denoiser.schedule, 2))
    fitted = _Problem(denoiser, sampler, noise[:half], {k: v[:half] for k, v in cond.items()}, batch_size)
    unseen = _Problem(denoiser, sampler, noise[half:], {k: v[half:] for k, v in cond.items()}, batch_size)
    for problem in (fitted, unseen):
        problem.solve(reference_steps)
    found = _search(fitted, steps, iterations, on_iteration or (lambda said: None))
    times = _on(denoiser.schedule, found.logsnr)
    others = {name: grid(denoiser.schedule, steps) for name, grid in HEURISTICS.items()}
    others[found.started_from] = found.start
    report = {
        "sampler": type(sampler).__name__,
        "schedule": type(denoiser.schedule).__name__,
        "steps": steps,
        "nfe": sampler.nfe(steps),
        "samples": len(noise),
        "reference_steps": reference_steps,
        "started_from": found.started_from,
        "rms": {"learned": unseen.rms(times)} | {key: unseen.rms(grid) for key, grid in others.items()},
    }
    return LearnedTimes(times, found.logsnr, report)


class _Problem:
    """Noise, the samples it should become, and how far those of a grid are from them."""

    def __init__(
        self, denoiser: Denoiser, sampler: Sampler, noise: Tensor, cond: dict[str, Tensor], batch_size: int
    ) -> None:
        self.denoiser = denoiser
        self.sampler = sampler
        self.noise = noise
        self.cond = cond
        self.batch_size = batch_size
        self.reference = noise

    def solve(self, steps: int) -> None:
        """Makes the reference."""
        times = LogSNR(np.exp(-CLEANEST / 2), np.exp(-NOISIEST / 2))(self.denoiser.schedule, steps)
        self.reference = self.samples(DPMSolverPP2M(), times)

    def samples(self, sampler: Sampler, times: Tensor) -> Tensor:
        """The samples of a grid, `[N, *]`."""
        schedule = self.denoiser.schedule
        _, sigma = schedule(times[:1].to(schedule.device))
        x = self.noise * sigma.to(self.noise)
        conds = {name: value.split(self.batch_size) for name, value in self.cond.items()}
        return torch.cat(
            [
                sampler(
                    self.denoiser,
                    part,
                    times.to(x.device),
                    noise=_refused,
                    **{name: value[i] for name, value in conds.items()},
                )
                for i, part in enumerate(x.split(self.batch_size))
            ]
        )

    def residuals(self, times: Tensor) -> Tensor:
        """The errors, scaled so that the sum of their squares is the mean square error; float64 `[N·D]`."""
        error = (self.samples(self.sampler, times) - self.reference).double().flatten().cpu()
        return error / len(error) ** 0.5

    def rms(self, times: Tensor) -> float:
        """The root mean square error per dimension; infinite for a grid on which the sampler fails."""
        return self.residuals(times).norm().nan_to_num(torch.inf).item()


class _Found(NamedTuple):
    """A minimum: the error there, the noise levels `[K]`, and the times `[K + 1]` the search began with."""

    error: float
    logsnr: Tensor
    started_from: str
    start: Tensor


def _search(problem: _Problem, steps: int, iterations: int, say: Callable[[str], None]) -> _Found:
    """The better of the minima that two starts lead to."""
    starts = [_best(problem, SHORTENED, steps)]
    if steps < _FEW:
        starts.append(_best(problem, HEURISTICS, steps))
    else:
        half = _search(problem, steps // 2, iterations, say).logsnr
        between = np.interp(np.linspace(0, len(half) - 1, steps), np.arange(len(half)), half)
        refined = _on(problem.denoiser.schedule, torch.from_numpy(between))
        starts.append((f"learned for {steps // 2} steps", refined))
    found = []
    for name, start in starts:
        error, logsnr = _minimise(
            problem, start, iterations, lambda said, name=name: say(f"{steps} times from {name}: {said}")
        )
        found.append(_Found(error, logsnr, name, start))
    return min(found, key=lambda each: each.error)


def _best(problem: _Problem, grids: dict[str, Discretization], steps: int) -> tuple[str, Tensor]:
    """The grid of the smallest error, its name and its times."""
    times = {name: grid(problem.denoiser.schedule, steps) for name, grid in grids.items()}
    best = min(times, key=lambda name: problem.rms(times[name]))
    return best, times[best]


def _minimise(problem: _Problem, start: Tensor, iterations: int, say: Callable[[str], None]) -> tuple[float, Tensor]:
    """The error at a minimum near a grid, and the noise levels there."""
    schedule = problem.denoiser.schedule
    ends = schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64, device=schedule.device)).cpu()
    low, high = ends.clamp(NOISIEST, CLEANEST)
    span = high - low

    def levels(logits: np.ndarray) -> Tensor:
        # the gaps between the noise levels, the bounds included, are a softmax: always positive, always filling
        gaps = torch.cat([torch.from_numpy(logits), torch.zeros(1, dtype=torch.float64)]).softmax(0)
        return low + span * (_GAP + (1 - len(gaps) * _GAP) * gaps[:-1]).cumsum(0)

    latest: dict[bytes, np.ndarray] = {}

    def residuals(logits: np.ndarray) -> np.ndarray:
        # the optimiser asks for the derivative where it has just asked for the value
        if logits.tobytes() not in latest:
            latest.clear()
            latest[logits.tobytes()] = problem.residuals(_on(schedule, levels(logits))).numpy()
        return latest[logits.tobytes()]

    # a difference large enough that the rounding of the samples does not show
    h = torch.finfo(problem.noise.dtype).eps ** (1 / 3)

    iteration = count(1)

    def jacobian(logits: np.ndarray) -> np.ndarray:
        at = residuals(logits)
        say(f"iteration {next(iteration)} of at most {iterations}, error {np.linalg.norm(at):.4g}")
        moved = (problem.residuals(_on(schedule, levels(logits + h * unit))).numpy() for unit in np.eye(len(logits)))
        return np.stack([(value - at) / h for value in moved], axis=1)

    inside = schedule.logsnr(start[:-1].to(schedule.device)).cpu().clamp(low, high)
    gaps = (torch.cat([low[None], inside, high[None]]).diff() / span).clamp(min=10 * _GAP).log()
    solution = least_squares(
        residuals,
        (gaps[:-1] - gaps[-1]).numpy(),
        jacobian,  # pyright: ignore[reportArgumentType]: its annotation forgets functions
        x_scale="jac",
        ftol=_ENOUGH,
        max_nfev=iterations,
    )
    return (2 * solution.cost) ** 0.5, levels(solution.x)


def _on(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """The times of noise levels on a schedule, and the clean end."""
    return torch.cat([schedule.inverse(logsnr.to(schedule.device)).cpu(), torch.zeros(1, dtype=torch.float64)])


def _refused(*args: Any, **kwargs: Any) -> NoReturn:
    raise DiffxError(
        "times are learned by following single samples, which needs a deterministic sampler; learn them with "
        "sampler=ddim sampler.eta=0 or sampler=dpmpp_2m"
    )
