"""From many runs to rows with means, effects and verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffx.compare.arms import Group, columns, edited, final, grouped, listed, name_of, one_each, own
from diffx.compare.baseline import baseline_rows, chosen_baseline
from diffx.compare.budget import Budget
from diffx.compare.costs import Costs, costs_of, device_of, mean
from diffx.compare.effects import LEVEL, Estimate, between_samples, between_seeds, holm, mean_over_seeds
from diffx.compare.known import direction, metric_of
from diffx.experiment import Collection, Measurement
from diffx.metrics import Value
from diffx.utils import DiffxError, nearest


@dataclass(frozen=True)
class Row:
    """One arm, sampled in one way.

    Arguments:
        arm: the value of each axis, by the key that sets it.
        point: the value of each key that tells ways of sampling apart.
        values: the metric of each training seed, finite ones only.
        runs: the run directory of each seed, those without a value included.
        mean: over seeds; of one seed its value. None where there is no value.
        effect: the difference from the baseline; None for the baseline, and where there is nothing to compare.
        effect_seeds: the seeds that it stands on.
        p: its p-value, adjusted by Holm's method for the number of effects in the table.
        verdict: `better`, `worse` or `not distinguishable`; `baseline`; empty where there is none.
        mismatch: what was measured otherwise than in most rows.
        nfe: denoiser calls per sample.
        images_per_second: of training, the median over the log.
        device_hours: of training on all devices, the mean over seeds, evaluations left out.
        floor: the metric of real images, where it was measured.
    """

    arm: dict[str, Any]
    point: dict[str, Any]
    values: dict[int, Value]
    runs: dict[int, Path]
    mean: Estimate | None
    effect: Estimate | None = None
    effect_seeds: tuple[int, ...] = ()
    p: float | None = None
    verdict: str = ""
    mismatch: tuple[str, ...] = ()
    nfe: float | None = None
    images_per_second: float | None = None
    device_hours: float | None = None
    floor: float | None = None

    @property
    def cells(self) -> dict[str, Any]:
        """What tells the row apart."""
        return self.arm | self.point

    @property
    def name(self) -> str:
        """The row in words, `schedule=cosine, sampler.steps=10`."""
        return name_of(self.cells)

    @property
    def is_baseline(self) -> bool:
        """Whether others are compared with it."""
        return self.verdict == "baseline"


@dataclass(frozen=True)
class Comparison:
    """What many runs say about one metric.

    Arguments:
        metric: the metric.
        direction: 1 where higher is better, −1 where lower is, 0 where neither is: then there are no verdicts.
        columns: the keys that tell rows apart, in their order.
        rows: the rows, in the order of their cells.
        baseline: the cells of what rows are compared with; a key that is not named is each row's own.
        budget: what the arms were trained with.
        device: `GPU`, or `device` on a CPU.
        tests: the number of effects among which the verdicts are corrected.
        notes: what is wrong, missing or left out, one sentence each.
    """

    metric: str
    direction: int
    columns: list[str]
    rows: list[Row]
    baseline: dict[str, Any]
    budget: Budget
    device: str = "device"
    tests: int = 0
    notes: list[str] = field(default_factory=list)

    def best_seed(self, row: Row) -> tuple[int, float] | None:
        """The seed with the best value and this value: the more seeds, the better it is by chance alone."""
        if not row.values or not self.direction:
            return None
        seed = max(row.values, key=lambda seed: self.direction * row.values[seed].value)
        return seed, row.values[seed].value


def compare(
    collection: Collection,
    metric: str | None = None,
    by: Sequence[str] | None = None,
    baseline: str | Mapping[str, Any] | None = None,
    allow_mismatch: bool = False,
) -> Comparison:
    """Compares arms by one metric, over seeds.

    Only evaluations of the end of a training count. What cannot be compared is named in `Comparison.notes`.

    Arguments:
        collection: the runs.
        metric: such as `fd_digits`; by default a Fréchet distance, if there is one.
        by: the keys whose values make the columns. By default all that differ between arms, or between the ways in
            which they were sampled. Where only keys of arms are named, each run's own way of sampling is taken. What
            differs beside them stays apart.
        baseline: the cells of what the others are compared with, as `schedule=cosine` or a mapping; by default those of
            the first arm. Keys that it leaves out are each row's own, where several arms have its cells.
        allow_mismatch: show rows that were measured otherwise than most, marked and without a verdict.

    Returns:
        The comparison.

    Raises:
        DiffxError: if there is no such metric, axis or baseline, nothing is measured, or values were measured by
            different rulers and that is not allowed.
    """
    notes = [*collection.problems]
    whole, said = final(collection)
    notes += said
    metric = _metric(whole, metric, notes)
    if by is not None and not any(key in whole.points for key in by):
        whole, said = own(whole)
        notes += said
    keys, said = columns(whole, by)
    notes += said
    groups, said = grouped(whole, keys, metric)
    notes += said + edited(whole)
    chosen, said = one_each(groups, metric, allow_mismatch)
    notes += said
    costs = costs_of(whole)
    rows = [_row(group, found, otherwise, metric, costs, notes) for group, found, otherwise in chosen]
    wanted, said = chosen_baseline(rows, baseline, keys)
    notes += said
    rows, tests = _effects(rows, wanted, direction(metric), notes)
    device = device_of(whole)
    if not all(row.device_hours for row in rows):
        notes.append(f"{device}-hours are not in the training log of every run")
    return Comparison(metric, direction(metric), keys, rows, wanted, costs.budget(device), device, tests, notes)


def _metric(collection: Collection, metric: str | None, notes: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for _, m in collection.measurements for name in m.evaluation.values))
    if not names:
        why = f": {'; '.join(notes[:3])}" if notes else ""
        raise DiffxError(f"none of these runs has an evaluation at the end of its training{why}")
    if metric is None:
        return metric_of(names)
    if metric not in names:
        raise DiffxError(f"there is no metric '{metric}'{nearest(metric, names)}; measured are {', '.join(names)}")
    return metric


def _row(
    group: Group,
    found: Mapping[int, Measurement],
    otherwise: Sequence[str],
    metric: str,
    costs: Costs,
    notes: list[str],
) -> Row:
    values: dict[int, Value] = {}
    for seed in sorted(found):
        value = found[seed].evaluation.values[metric]
        if math.isfinite(value.value):
            values[seed] = value
        else:
            why = f" ({value.note})" if value.note else ""
            notes.append(f"{name_of(group.arm | group.point)}, seed {seed}: {metric} is {value.value}{why}: left out")
    floors = {
        m.evaluation.values[f"{metric}_floor"].value for m in found.values() if f"{metric}_floor" in m.evaluation.values
    }
    return Row(
        group.arm,
        group.point,
        values,
        {seed: member.run.path for seed, member in sorted(group.runs.items())},
        mean_over_seeds(list(values.values())) if values else None,
        mismatch=tuple(otherwise),
        nfe=mean([m.evaluation.nfe for m in found.values()]),
        images_per_second=mean([costs.speed.get(m.run.path) for m in group.runs.values()]),
        device_hours=mean([costs.hours.get(m.run.path) for m in group.runs.values()]),
        floor=mean(list(floors)),
    )


def _effects(rows: list[Row], wanted: Mapping[str, Any], sign: int, notes: list[str]) -> tuple[list[Row], int]:
    """The rows with their effects and verdicts, and how many effects there are."""
    against = baseline_rows(rows, wanted)
    found, alone, unshared, few = [], [], [], []
    for row, other in zip(rows, against, strict=True):
        if other is row:
            found.append(replace(row, verdict="baseline"))
            continue
        if other is None or not row.values or not other.values:
            alone += [row.name] if row.values else []
            found.append(row)
            continue
        shared = tuple(seed for seed in row.values if seed in other.values)
        unshared += [] if shared else [row.name]
        few += [row.name] if shared and len(shared) < max(len(row.values), len(other.values)) else []
        estimate = None
        if len(shared) > 1:
            estimate = between_seeds(*([r.values[seed].value for seed in shared] for r in (row, other)))
        elif shared:
            estimate = between_samples(row.values[shared[0]], other.values[shared[0]])
        found.append(replace(row, effect=estimate, effect_seeds=shared))
    for names, why in ((alone, "no baseline for"), (unshared, "no seed in common with the baseline:")):
        notes += [f"{why} {listed(names)}"] if names and len(names) < len(rows) else []
    notes += [f"compared over the seeds that both have, which are not all: {listed(few)}"] if few else []
    constant = [row.name for row in found if row.effect and row.effect.p is None]
    notes += (
        [f"differs from the baseline by the same at every seed, so no interval and no verdict: {listed(constant)}"]
        if constant
        else []
    )
    tested = [
        k for k, row in enumerate(found) if row.effect and row.effect.p is not None and not _unfair(row, against[k])
    ]
    adjusted = holm([p for k in tested if (effect := found[k].effect) and (p := effect.p) is not None])
    for k, p in zip(tested, adjusted, strict=True):
        found[k] = replace(found[k], p=p, verdict=_verdict(found[k].effect, p, sign))
    return found, len(tested)


def _unfair(row: Row, other: Row | None) -> bool:
    return other is None or bool(row.mismatch or other.mismatch)


def _verdict(effect: Estimate | None, p: float, sign: int) -> str:
    if effect is None or not sign:
        return ""
    if p > LEVEL:
        return "not distinguishable"
    return "better" if sign * effect.value > 0 else "worse"
