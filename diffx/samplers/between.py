"""Noise levels between those of the grid, evaluated before a sampler's loop as the grid itself is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffx.samplers.base import ancestral
from diffx.schedules import NoiseLevel, Schedule


def at_times(schedule: Schedule, times: Sequence[Any], like: NoiseLevel) -> list[NoiseLevel]:
    """The noise levels at some times.

    Arguments:
        schedule: the schedule.
        times: numbers, or tensors `[B, 1, …, 1]` where each sample has its own time.
        like: a noise level of the grid, whose kind, dtype and device are taken.

    Returns:
        One noise level per time.
    """
    if isinstance(like.time, Tensor):
        return [schedule.level(time.reshape(-1).to(like.t), time) for time in times]
    return schedule.levels(torch.tensor(times, dtype=torch.float64).to(like.t)) if times else []


@torch.no_grad()
def times_at(schedule: Schedule, logsnr: Sequence[Any]) -> list[Any]:
    """The times at which the schedule has the given logSNRs, numbers or tensors as these are."""
    if logsnr and isinstance(logsnr[0], Tensor):
        exact = [value.to(schedule.device, torch.float64) for value in logsnr]
        return [schedule.inverse(e.reshape(-1)).reshape(v.shape).to(v) for e, v in zip(exact, logsnr, strict=True)]
    return schedule.inverse(torch.tensor(logsnr, dtype=torch.float64, device=schedule.device)).tolist()


def between(schedule: Schedule, levels: list[NoiseLevel], shares: Sequence[float], eta: float = 0.0) -> list[Any]:
    """The noise levels inside each step, at the given shares of the way in logSNR.

    Arguments:
        schedule: the schedule.
        levels: the K + 1 noise levels of the grid.
        shares: in (0, 1].
        eta: η of ancestral steps, which end at a smaller noise level before noise is added (see `base.ancestral`).

    Returns:
        K tuples of as many noise levels as shares.
    """
    ends = [(t.logsnr, ancestral(t, s, eta).logsnr) for t, s in pairwise(levels)]
    times = times_at(schedule, [first + share * (last - first) for first, last in ends for share in shares])
    inside = iter(at_times(schedule, times, levels[0]))
    return list(zip(*[inside] * len(shares), strict=True))
