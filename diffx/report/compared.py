"""From a comparison to what the page shows of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffx.compare import Comparison, Row, direction, metric_of
from diffx.compare.arms import name_of, text
from diffx.experiment import Collection
from diffx.report.arms import Arm, arms_of, label_of
from diffx.report.numbers import count, listed, number
from diffx.report.provenance import root_of
from diffx.report.verdicts import ArmRow


@dataclass(frozen=True)
class Verdicts:
    """The comparison of all arms, those without a value included.

    Arguments:
        metric: what they are compared by.
        axes: what tells arms apart.
        columns: what tells rows apart: axes, and ways to sample.
        arms: all arms, measured or not.
        rows: the measured ones, the best first.
        baseline: what the others are held against, in words; empty if nothing.
        reference: the level of each column that the baseline has.
        caption: what the table shows and how it was computed.
        remarks: what the reader has to know, one sentence each.
    """

    metric: str
    axes: list[str]
    columns: list[str]
    arms: list[Arm]
    rows: list[ArmRow]
    baseline: str
    reference: dict[str, str]
    caption: str
    remarks: list[str]

    @property
    def levels(self) -> dict[str, list[str]]:
        """The levels of everything that is asked about: of axes, and of ways to sample."""
        found = {axis: [arm.levels[axis] for arm in self.arms] for axis in self.axes}
        sampled = [key for key in self.columns if key not in found]
        return found | {key: list(dict.fromkeys(row.levels[key] for row in self.rows)) for key in sampled}


def verdicts_of(collection: Collection, comparison: Comparison) -> Verdicts:
    """What the page shows of a comparison.

    Arguments:
        collection: all runs, those that are not compared included.
        comparison: that of the others.
    """
    axes = _axes(collection, comparison.columns)
    arms = arms_of(collection, axes)
    rows = [_row(row, arms) for row in comparison.rows if row.mean is not None]
    sign = -1 if direction(comparison.metric) > 0 else 1
    rows.sort(key=lambda row: sign * row.value)
    return Verdicts(
        comparison.metric,
        axes,
        comparison.columns,
        arms,
        rows,
        _baseline(comparison),
        {key: text(value) for key, value in comparison.baseline.items()},
        _caption(comparison),
        _remarks(collection, comparison),
    )


def without_verdicts(collection: Collection, metric: str | None) -> Verdicts:
    """The arms alone, where nothing is there to be compared yet.

    Arguments:
        collection: the runs.
        metric: the metric asked for.
    """
    axes = _axes(collection, [])
    logged = [str(name).rpartition("/")[2] for name in collection.history.columns if str(name).startswith("eval/")]
    name = metric or metric_of(logged or ["fid"])
    return Verdicts(name, axes, axes, arms_of(collection, axes), [], "", {}, "", [])


def _axes(collection: Collection, columns: Sequence[str]) -> list[str]:
    """All axes of all runs, in the order of the columns."""
    return [
        *(key for key in columns if key in collection.axes),
        *(key for key in collection.axes if key not in columns),
    ]


def _row(row: Row, arms: Sequence[Arm]) -> ArmRow:
    assert row.mean is not None
    runs = {str(path) for path in row.runs.values()}
    arm = next(arm for arm in arms if arm.runs & runs)
    point = {key: text(value) for key, value in row.point.items()}
    notes = [] if row.p is None else [f"p = {row.p:.2g}" if row.p >= 0.001 else "p < 0.001"]
    notes += [f"over {count(len(row.effect_seeds), 'shared seed')}"] * (0 < len(row.effect_seeds) < len(row.values))
    notes += ["over samples of one training each"] * (row.effect is not None and row.effect.over == "samples")
    notes += [f"measured otherwise: {what}" for what in row.mismatch]
    return ArmRow(
        arm=arm,
        levels={key: text(value) for key, value in row.cells.items()},
        label=" · ".join(([arm.label] if arm.levels or not point else []) + ([label_of(point)] if point else [])),
        baseline=row.is_baseline,
        by_seed=[(seed, value.value, value.stderr) for seed, value in row.values.items()],
        value=row.mean.value,
        bounds=row.mean.interval,
        change=row.effect.value if row.effect else None,
        change_bounds=row.effect.interval if row.effect else None,
        tone=row.verdict if row.verdict in ("better", "worse") else "same",
        verdict="baseline" if row.is_baseline else row.verdict or "no verdict",
        note="; ".join(notes),
        nfe=row.nfe,
        device_hours=row.device_hours,
    )


def _baseline(comparison: Comparison) -> str:
    own = [key for key in comparison.columns if key not in comparison.baseline]
    same = f" at the same {listed(own)}" if own and comparison.baseline else ""
    return name_of(comparison.baseline) + same if comparison.baseline else ""


def _caption(comparison: Comparison) -> str:
    over = {row.mean.over for row in comparison.rows if row.mean is not None}
    several = "mean over training seeds with its 95 % interval" if "seeds" in over else ""
    single = "value of one training with the 95 % interval of its samples" if "samples" in over else ""
    first = "best" if direction(comparison.metric) else "lowest"
    said = f"{comparison.metric}: {' or '.join(filter(None, [several, single])) or 'values'}; the {first} first."
    calls = {row.nfe for row in comparison.rows if row.mean is not None}
    if len(calls) == 1 and None not in calls:
        said += f" All at NFE {calls.pop():g}."
    if comparison.tests:
        said += " Differences are paired: runs of the same seed share initial weights, data order and noise."
        said += " Verdicts are at the 5 % level;" if direction(comparison.metric) else ""
        said += f" p is corrected for {count(comparison.tests, 'difference')} by Holm's method."
    return said


def _remarks(collection: Collection, comparison: Comparison) -> list[str]:
    said = [str(comparison.budget)]
    floors = sorted(row.floor for row in comparison.rows if row.floor is not None)
    if floors:
        told = number(floors[0]) if floors[0] == floors[-1] else f"{number(floors[0])} to {number(floors[-1])}"
        said.append(f"real images in place of samples have {comparison.metric} {told}")
    notes = [note for note in comparison.notes if note not in collection.problems]
    return [_sentence(note.replace(f"{root_of(collection)}/", "")) for note in (*said, *notes)]


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}{'' if note.endswith('.') else '.'}"
