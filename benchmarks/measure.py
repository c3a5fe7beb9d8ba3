"""Interleaved repetitions: contenders take turns, so that what else the machine does falls upon all of them."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]
"""Seconds since some moment."""

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Case:
    """A question and those who answer it.

    Arguments:
        group: the table.
        name: the case, such as a solver and the shape of its tensors.
        contenders: by name, what runs once and returns the microseconds per step (or call); the first is the reference.
        rounds: how often each runs.
        extra: further numbers of a contender, shown beside its times.
    """

    group: str
    name: str
    contenders: dict[str, Callable[[], float]]
    rounds: int
    extra: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Row:
    """One contender of one case, in microseconds.

    Arguments:
        group: as in `Case`.
        case: as in `Case`.
        contender: its name.
        median: the median of its rounds.
        smallest: the fastest round.
        largest: the slowest round.
        difference: the median, over the rounds, of its time less the reference's time in the same round.
        ratio: likewise of its time divided by the reference's.
        extra: as in `Case`.
    """

    group: str
    case: str
    contender: str
    median: float
    smallest: float
    largest: float
    difference: float
    ratio: float
    extra: dict[str, float]


def measure(case: Case) -> list[Row]:
    """Runs all contenders in turn, round by round, every other round backwards."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for n in range(case.rounds):
        for name in list(times)[:: 1 if n % 2 == 0 else -1]:
            gc.collect()
            times[name].append(case.contenders[name]())
    reference = next(iter(times.values()))
    return [_row(case, name, values, reference) for name, values in times.items()]


def _row(case: Case, name: str, values: list[float], reference: list[float]) -> Row:
    pairs = list(zip(values, reference, strict=True))
    return Row(
        case.group,
        case.name,
        name,
        statistics.median(values),
        min(values),
        max(values),
        statistics.median(value - other for value, other in pairs),
        statistics.median(value / other for value, other in pairs),
        case.extra.get(name, {}),
    )


def microseconds(
    clock: Clock,
    function: Callable[[], object],
    calls: int,
    per_call: int = 1,
    setup: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """Times many calls of a function, after one to warm up.

    Arguments:
        clock: what it is timed with.
        function: what is timed.
        calls: how often it is called for one measurement.
        per_call: steps within one call.
        setup: called before each call, and not timed.

    Returns:
        What runs the measurement and returns the microseconds per step.
    """

    def once() -> float:
        setup()
        started = clock()
        function()
        return clock() - started

    def run() -> float:
        once()
        return sum(once() for _ in range(calls)) / (calls * per_call) * 1e6

    return run


def long_call(clock: Clock, function: Callable[[], object], scale: float = 1e6) -> Callable[[], float]:
    """Times one call of a function that takes long, after one to warm up before the first measurement.

    Arguments:
        clock: what it is timed with.
        function: what is timed.
        scale: what the seconds are multiplied by.
    """
    warm: list[bool] = []

    def run() -> float:
        if not warm:
            function()
            warm.append(True)
        started = clock()
        function()
        return (clock() - started) * scale

    return run
