"""Main effects and interactions of the axes of a sweep.

An arm of a sweep is a combination of levels, one of each axis. The marginal mean of a level is the mean over all
combinations of the other axes, each counted once however many seeds it has. Only those combinations count that are
there for every level, so that two marginal means differ by the level alone.

Seeds are blocks: each seed that all combinations share gives one value of a mean or a contrast, and the interval is
Student's t over these. Runs of one seed share initial weights and noise, and so need not be independent for it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from diffx.metrics.values import BLOCKS

Interval = tuple[float, float]

Cell = tuple[tuple[str, ...], tuple[str, ...]]
"""A combination: its levels of the axes asked for, and `axis=level` of all others."""

_IMAGES = float(stdtrit(BLOCKS - 1, 0.975))
"""Quantile of the jackknife's standard errors."""


@dataclass(frozen=True)
class Observation:
    """The metric of one run.

    Arguments:
        levels: the level of each axis, as `{"schedule": "cosine"}`.
        seed: the training seed.
        value: the metric.
        stderr: one standard error of it from its images, None where unknown.
    """

    levels: Mapping[str, str]
    seed: int
    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean or a contrast.

    Arguments:
        levels: the levels that it belongs to, in the order of the axes asked for.
        value: the number.
        interval: its 95 % interval; None where it cannot be told.
        seeds: how many seeds the interval stands on; below 2 it is from the images alone.
    """

    levels: tuple[str, ...]
    value: float
    interval: Interval | None
    seeds: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Effects:
    """Marginal means over one axis, or over two, and what they differ by.

    Arguments:
        axes: the one or two axes.
        means: the marginal mean of each level, or pair of levels.
        contrasts: of one axis, each level's mean minus that of the reference level; of two, the difference that the
            first axis makes at a level of the second, minus the difference that it makes at the reference level.
        reference: the reference levels.
        combinations: over how many combinations of the other axes each mean goes.
        omitted: how many combinations of the other axes are left out since some level lacks them, or a seed of theirs.
    """

    axes: tuple[str, ...]
    means: list[Estimate]
    contrasts: list[Estimate]
    reference: tuple[str, ...]
    combinations: int
    omitted: int


def effects(
    observations: Sequence[Observation], axes: Sequence[str], reference: Mapping[str, str] | None = None
) -> Effects | None:
    """Main effects of one axis, or the interaction of two.

    Source: Box, Hunter and Hunter, *Statistics for Experimenters*, 2nd edition, Wiley 2005, chapters 4 and 5.

    Arguments:
        observations: the runs; every one names the same axes.
        axes: one axis, or two.
        reference: the level of each axis that others are held against; the first one by default.

    Returns:
        The effects; None where no combination of the other axes is there for every level, or an axis has one level.
    """
    levels = [_levels(observations, axis) for axis in axes]
    pairs = list(itertools.product(*levels))
    cells = _cells(observations, axes)
    others = sorted({rest for _, rest in cells})
    kept = [rest for rest in others if all((pair, rest) in cells for pair in pairs)]
    if not kept or min(map(len, levels)) < 2:
        return None
    kept = _equally_seeded(cells, pairs, kept)
    used = {key: cell for key, cell in cells.items() if key[1] in kept}
    seeds = sorted(set.intersection(*(set(cell) for cell in used.values())))
    first = tuple((reference or {}).get(axis, found[0]) for axis, found in zip(axes, levels, strict=True))
    start = tuple(name if name in found else found[0] for name, found in zip(first, levels, strict=True))

    def estimate(names: tuple[str, ...], signs: Mapping[tuple[str, ...], float]) -> Estimate:
        weights = {(pair, rest): sign / len(kept) for pair, sign in signs.items() for rest in kept}
        return _estimate(names, weights, used, seeds)

    means = [estimate(pair, {pair: 1.0}) for pair in pairs]
    contrasts = [estimate(pair, _contrast(pair, start)) for pair in pairs if _differs(pair, start)]
    return Effects(tuple(axes), means, contrasts, start, len(kept), len(others) - len(kept))


def _equally_seeded(
    cells: Mapping[Cell, Mapping[int, Observation]], pairs: Sequence[tuple[str, ...]], rests: list[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The combinations that have the seeds that most have: one lost run is not to cost all others their intervals."""
    found = [frozenset(cells[pair, rest]) for pair in pairs for rest in rests]
    usual = max(found, key=lambda seeds: (found.count(seeds), len(seeds), sorted(seeds)))
    return [rest for rest in rests if all(usual <= set(cells[pair, rest]) for pair in pairs)] or rests


def _differs(pair: tuple[str, ...], start: tuple[str, ...]) -> bool:
    return all(a != b for a, b in zip(pair, start, strict=True))


def _contrast(pair: tuple[str, ...], start: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """The signs of a difference, or of a difference of differences."""
    signs: dict[tuple[str, ...], float] = {}
    for choice in itertools.product((True, False), repeat=len(pair)):
        corner = tuple(a if own else b for own, a, b in zip(choice, pair, start, strict=True))
        signs[corner] = (-1.0) ** choice.count(False)
    return signs


def _levels(observations: Sequence[Observation], axis: str) -> list[str]:
    """The levels of an axis: numbers by size, names in the order of the alphabet."""
    found = {observation.levels[axis] for observation in observations}
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


def _cells(observations: Sequence[Observation], axes: Sequence[str]) -> dict[Cell, dict[int, Observation]]:
    """The runs of each combination by their seeds; a combination is its levels of `axes` and those of the others."""
    cells: dict[Cell, dict[int, Observation]] = {}
    for observation in observations:
        rest = tuple(f"{axis}={level}" for axis, level in sorted(observation.levels.items()) if axis not in axes)
        cells.setdefault((tuple(observation.levels[axis] for axis in axes), rest), {})[observation.seed] = observation
    return cells


def _estimate(
    names: tuple[str, ...],
    weights: Mapping[Cell, float],
    cells: Mapping[Cell, Mapping[int, Observation]],
    seeds: Sequence[int],
) -> Estimate:
    if len(seeds) > 1:
        each = np.array([sum(w * cells[cell][seed].value for cell, w in weights.items()) for seed in seeds])
        half = float(stdtrit(len(seeds) - 1, 0.975)) * float(each.std(ddof=1)) / math.sqrt(len(seeds))
        value = float(each.mean())
        return Estimate(names, value, (value - half, value + half), len(seeds))
    value, variance = 0.0, 0.0
    for cell, weight in weights.items():
        runs = list(cells[cell].values())
        value += weight * sum(run.value for run in runs) / len(runs)
        for run in runs:
            variance += (weight / len(runs)) ** 2 * (math.nan if run.stderr is None else run.stderr**2)
    half = _IMAGES * math.sqrt(variance) if math.isfinite(variance) else None
    return Estimate(names, value, None if half is None else (value - half, value + half), len(seeds))
