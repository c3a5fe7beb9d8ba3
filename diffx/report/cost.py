"""Quality against what it costs: function evaluations, sampling time, training compute."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffx.compare.arms import text
from diffx.compare.known import direction, ruler
from diffx.experiment import Collection, Measurement, Member, fingerprint
from diffx.plots import Chart, Line, decades
from diffx.report.aim import aim
from diffx.report.arms import Arm
from diffx.report.numbers import count
from diffx.report.plot import Control, Plot


@dataclass(frozen=True)
class Point:
    """One arm at one way to sample.

    Arguments:
        arm: the arm.
        way: how was sampled, without what makes the NFE; empty where all are alike.
        values: the metric of each seed.
        stderr: its standard error where there is one seed.
        costs: by the option of the plot that they belong to.
    """

    arm: Arm
    way: str
    values: list[float]
    stderr: float | None
    costs: dict[str, float]

    @property
    def name(self) -> str:
        """The line that it belongs to."""
        return f"{self.arm.label} · {self.way}" if self.way else self.arm.label

    @property
    def mean(self) -> float:
        """The metric."""
        return sum(self.values) / len(self.values)


_LABELS = {
    "NFE": "function evaluations per sample (NFE)",
    "sampling time": "sampling time [seconds per 1000 samples]",
    "training time": "training time [device-hours per run]",
    "training FLOPs": "training compute [FLOP per run]",
}


def points(collection: Collection, arms: Sequence[Arm], metric: str) -> tuple[list[Point], list[str]]:
    """The metric of every arm at every way to sample that was measured, at the end of each run.

    Returns:
        The points, and a sentence for everything that is not among them.
    """
    found = [(k, *pair) for k, pair in enumerate(collection.measurements) if metric in pair[1].evaluation.values]
    found, said = _comparable(found, metric)
    varying = [key for key in collection.points if not key.endswith(".steps")]
    spent = _spent(collection)
    points = []
    for arm in arms:
        groups: dict[tuple[str, float], list[tuple[Member, Measurement]]] = {}
        for k, member, measurement in found:
            if str(member.run.path) in arm.runs:
                ways = [_way(key, collection.points[key][k]) for key in varying]
                way = ", ".join(filter(None, ways))
                groups.setdefault((way, _nfe(measurement)), []).append((member, measurement))
        for (way, nfe), group in sorted(groups.items(), key=lambda item: item[0]):
            values = [measurement.evaluation.values[metric] for _, measurement in group]
            numbers = [value.value for value in values if math.isfinite(value.value)]
            if numbers:
                costs = ({"NFE": nfe} if nfe else {}) | _costs(group, spent)
                points.append(Point(arm, way, numbers, values[0].stderr if len(values) == 1 else None, costs))
    return points, said


def _comparable(
    found: list[tuple[int, Member, Measurement]], metric: str
) -> tuple[list[tuple[int, Member, Measurement]], list[str]]:
    """The evaluations at the end of each run that were measured as most of them were."""
    said = []
    newest: dict[str, int] = {}
    for _, member, measurement in found:
        step = measurement.evaluation.protocol.get("step") or 0
        newest[str(member.run.path)] = max(step, newest.get(str(member.run.path), 0))
    last = [f for f in found if (f[2].evaluation.protocol.get("step") or 0) == newest[str(f[1].run.path)]]
    keys = Counter(_measured(measurement, metric) for _, _, measurement in last)
    if len(keys) > 1:
        kept = min(keys, key=lambda key: (-keys[key], key))
        others = sum(n for key, n in keys.items() if key != kept)
        said.append(
            f"{others} of {len(last)} evaluations were measured with another number of images, reference or extractor, "
            "and are not in this plot: such values cannot be compared."
        )
        last = [f for f in last if _measured(f[2], metric) == kept]
    return last, said


def _measured(measurement: Measurement, metric: str) -> str:
    return fingerprint(ruler(measurement.evaluation.protocol, metric))


def _nfe(measurement: Measurement) -> float:
    """Function evaluations per sample; an adaptive sampler's were counted."""
    counted = measurement.evaluation.values.get("nfe")
    return float(measurement.evaluation.protocol.get("nfe") or (counted.value if counted else 0.0))


def _way(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{key.rpartition('.')[2]}={text(value)}" if "." in key else text(value)


def _spent(collection: Collection) -> dict[str, dict[str, float]]:
    """What each run's training took, where its log says so."""
    columns = {"training time": ("device_seconds", 3600.0), "training FLOPs": ("flops", 1.0)}
    rows = {str(member.run.path): member.run.latest() for member in collection.members}
    return {
        run: {option: row[column] / unit for option, (column, unit) in columns.items() if row.get(column, 0) > 0}
        for run, row in rows.items()
    }


def _costs(group: Sequence[tuple[Member, Measurement]], spent: dict[str, dict[str, float]]) -> dict[str, float]:
    sampled = [
        1000 * measurement.evaluation.seconds.get("sampling", math.nan) / measurement.evaluation.protocol["num_samples"]
        for _, measurement in group
    ]
    costs = {"sampling time": _mean(sampled)}
    for option in ("training time", "training FLOPs"):
        costs[option] = _mean(spent[str(member.run.path)].get(option, math.nan) for member, _ in group)
    return {option: cost for option, cost in costs.items() if math.isfinite(cost) and cost > 0}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def pareto_plot(points: Sequence[Point], metric: str) -> Plot | None:
    """The metric against each cost of which there is more than one, with the best values to be had for it.

    Arguments:
        points: what was measured.
        metric: its name.
    """
    options = [option for option in _LABELS if len({point.costs.get(option) for point in points} - {None}) > 1]
    if not options or (options[0] != "NFE" and len(points) < 2):
        return None
    charts: dict[tuple[str, ...], Chart] = {}
    for option in options:
        known = [point for point in points if math.isfinite(point.costs.get(option, math.nan))]
        lines = [
            *_lines(known, option, joined=not option.startswith("training")),
            *_front(known, option, direction(metric)),
        ]
        log_y = decades([point.mean for point in known]) > 0.7
        log_x = decades([point.costs[option] for point in known]) > 0.3
        charts[(option,)] = Chart(lines, _LABELS[option], metric, log_x=log_x, log_y=log_y)
    several = any(len(point.values) > 1 for point in points)
    bars = "bars reach from the lowest seed to the highest" if several else "bars are one standard error of the images"
    caption = f"{metric}: {aim(metric)}; {bars}."
    if direction(metric):
        caption += f" The dotted line is the best {metric} to be had up to that cost."
    if "sampling time" in options:
        caption += " Times are those of the machine that evaluated."
    return Plot("cost", f"{metric} against cost", caption, charts, (Control("cost", tuple(options)),))


def _lines(points: Sequence[Point], option: str, joined: bool) -> list[Line]:
    lines = []
    for name in dict.fromkeys(point.name for point in points):
        own = sorted((point for point in points if point.name == name), key=lambda point: point.costs[option])
        ways = sorted({point.way for point in points if point.arm is own[0].arm})
        low, high = zip(*map(_bounds, own), strict=True)
        lines.append(
            Line(
                name,
                [point.costs[option] for point in own],
                [point.mean for point in own],
                low,
                high,
                own[0].arm.style + 9 * ways.index(own[0].way),  # the arm's colour, another dash
                joined,
                [f"NFE {point.costs.get('NFE', 0):g}, {count(len(point.values), 'seed')}" for point in own],
            )
        )
    return lines


def _bounds(point: Point) -> tuple[float | None, float | None]:
    if len(point.values) > 1:
        return min(point.values), max(point.values)
    return (None, None) if point.stderr is None else (point.mean - point.stderr, point.mean + point.stderr)


def _front(points: Sequence[Point], option: str, sign: int) -> list[Line]:
    """The best value up to each cost, as a staircase; none where neither way is better."""
    if not sign:
        return []
    x: list[float] = []
    y: list[float] = []
    for point in sorted(points, key=lambda point: (point.costs[option], -sign * point.mean)):
        better = not y or sign * point.mean > sign * y[-1]
        if better and y:
            x, y = [*x, point.costs[option]], [*y, y[-1]]
        if better:
            x, y = [*x, point.costs[option]], [*y, point.mean]
    dearest = max(point.costs[option] for point in points)
    return [Line("best for the cost", [*x, dearest], [*y, y[-1]], style=None)]
