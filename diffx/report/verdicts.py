"""The comparison as the page shows it: a row per arm, and the answer in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffx.compare.known import direction
from diffx.plots import COLORS, Chart, Line
from diffx.report.aim import aim
from diffx.report.arms import Arm
from diffx.report.numbers import count, interval, number, rounded
from diffx.report.plot import Plot

Interval = tuple[float, float]

MOST = 12
"""Arms that the answer names one by one."""


@dataclass(frozen=True)
class ArmRow:
    """One arm, sampled in one way, in the table of the comparison.

    Arguments:
        arm: the arm.
        levels: its level of each column.
        label: a short name.
        baseline: whether the others are held against it.
        by_seed: seed, value and standard error (None where unknown) of each run.
        value: its mean.
        bounds: the 95 % interval of that; None where it cannot be told.
        change: the difference from the baseline; None for the baseline itself.
        change_bounds: the 95 % interval of that.
        tone: `better`, `worse`, or `same` for all else.
        verdict: in words.
        note: what the reader has to know; empty if nothing.
        nfe: function evaluations per sample; None where unknown.
        device_hours: of training; None where unknown.
    """

    arm: Arm
    levels: dict[str, str]
    label: str
    baseline: bool
    by_seed: list[tuple[int, float, float | None]]
    value: float
    bounds: Interval | None
    change: float | None
    change_bounds: Interval | None
    tone: str
    verdict: str
    note: str = ""
    nfe: float | None = None
    device_hours: float | None = None

    @property
    def color(self) -> str:
        """The colour of the arm in all plots."""
        return COLORS[self.arm.style % len(COLORS)]

    @property
    def seeds(self) -> int:
        """How many seeds it has."""
        return len({seed for seed, _, _ in self.by_seed})

    @property
    def mean(self) -> str:
        """The mean as text."""
        return number(self.value, _half(self.bounds))

    @property
    def interval(self) -> str:
        """Its interval as text."""
        return "" if self.bounds is None else interval(*self.bounds)

    @property
    def difference(self) -> str:
        """The difference from the baseline as text."""
        return "" if self.change is None else number(self.change, _half(self.change_bounds))

    @property
    def difference_interval(self) -> str:
        """Its interval as text."""
        return "" if self.change_bounds is None else interval(*self.change_bounds)

    @property
    def sort_mean(self) -> str:
        """The mean for sorting."""
        return repr(rounded(self.value))

    @property
    def sort_difference(self) -> str:
        """The difference for sorting: the baseline's is 0, an unknown one is empty."""
        return "0" if self.baseline else "" if self.change is None else repr(rounded(self.change))

    @property
    def cost(self) -> str:
        """NFE as text."""
        return "–" if self.nfe is None else f"{self.nfe:g}"

    @property
    def hours(self) -> str:
        """Device-hours as text."""
        return number(self.device_hours, digits=2)

    @property
    def values(self) -> list[str]:
        """The values of all seeds."""
        return [f"{seed}: {number(value, error)}" for seed, value, error in self.by_seed]


def _half(bounds: Interval | None) -> float | None:
    return None if bounds is None else (bounds[1] - bounds[0]) / 2


@dataclass(frozen=True)
class Answer:
    """What the comparison says.

    Arguments:
        lead: the first sentence.
        items: tone, arm and what it does, the most telling first.
        notes: what follows, one sentence each.
    """

    lead: str
    items: list[tuple[str, str, str]]
    notes: list[str]


def answer(rows: Sequence[ArmRow], metric: str, baseline: str) -> Answer:
    """What the comparison says, in sentences.

    Arguments:
        rows: all arms, the best first.
        metric: the metric.
        baseline: what the others are held against, in words.
    """
    if not rows:
        return Answer(f"There is no answer yet: no run has a value of {metric}.", [], [])
    best = rows[0]
    side = {1: "Highest", -1: "Lowest", 0: "Lowest"}[direction(metric)]
    notes = [f"{side} {metric}: {best.label} with {_with_interval(best)}."] if len(rows) > 1 else []
    if max(row.seeds for row in rows) < 2:
        notes.append("Every arm has one seed only: how much trainings of the same arm differ is not in the intervals.")
    others = [row for row in rows if not row.baseline]
    if len(others) == len(rows) or not others:
        return Answer(
            f"{best.label} reaches {metric} {_with_interval(best)}; there is nothing to compare it with.", [], notes
        )
    better, worse, same = (_toned(others, tone) for tone in ("better", "worse", "same"))
    own = [row for row in rows if row.baseline]
    told = f"the baseline {baseline}" + (f" ({metric} {_with_interval(own[0])})" if len(own) == 1 else "")
    word = "arm" if len({row.arm.label for row in rows}) == len(rows) else "combination"
    if not direction(metric):
        lead = f"{count(len(others), word)} held against {told}; of {metric} {aim(metric)}, so there are no verdicts."
    else:
        lead = (
            f"Of {count(len(others), word)} held against {told}, {_are(better)} better, {_are(worse)} worse and "
            f"{_are(same)} not distinguishable from it."
        )
    items = [
        (row.tone, row.label, f"{row.verdict}: {metric} {row.mean}" + (f", {_change(row)}" if row.difference else ""))
        for row in (*better, *worse, *same)
    ]
    if len(items) > MOST:
        notes.insert(0, f"{len(items) - MOST} more are in the table below.")
    return Answer(lead, items[:MOST], notes)


def _toned(rows: Sequence[ArmRow], tone: str) -> list[ArmRow]:
    return [row for row in rows if row.tone == tone]


def _are(group: Sequence[ArmRow]) -> str:
    return f"{len(group)} {'is' if len(group) == 1 else 'are'}"


def _change(row: ArmRow) -> str:
    bounds = f" [{row.difference_interval}]" if row.difference_interval else ""
    return f"a difference of {row.difference}{bounds}"


def _with_interval(row: ArmRow) -> str:
    return f"{row.mean} [{row.interval}]" if row.interval else row.mean


def forest(rows: Sequence[ArmRow], metric: str) -> Plot | None:
    """The mean of each arm with its interval and the values of its seeds.

    Arguments:
        rows: all arms, in the order of the table.
        metric: the metric.
    """
    if not rows:
        return None
    seeds = [Line("seeds", [v for _, v, _ in row.by_seed], [k] * len(row.by_seed), style=None, joined=False)
             for k, row in enumerate(rows) if len(row.by_seed) > 1]  # fmt: skip
    means = []
    for k, row in enumerate(rows):
        low, high = row.bounds or (None, None)
        notes = [count(row.seeds, "seed")]
        means.append(Line(row.label, [row.value], [k], [low], [high], row.arm.style, joined=False, notes=notes))
    baselines = [row.value for row in rows if row.baseline]
    chart = Chart(
        [*means, *seeds],
        f"{metric} ({aim(metric)})",
        "",
        yticks=[row.label + (" (baseline)" if row.baseline else "") for row in rows],
        mark=baselines[0] if len(baselines) == 1 else None,
    )
    caption = "Mean of each arm with its 95 % interval; strokes are single seeds, the dotted line is the baseline."
    return Plot("comparison", f"{metric} of each arm", caption, {(): chart})
