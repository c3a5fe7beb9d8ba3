"""Interleaved repetitions: contenders take turns, so that what else the machine does falls upon all of them."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Case:
    """A question and those who answer it.

    Arguments:
        group: the table.
        name: the row's case, such as the shape of the tensors.
        contenders: by name, what runs once and returns the microseconds per step (or call); the first is the reference.
        repetitions: how often each runs.
    """

    group: str
    name: str
    contenders: dict[str, Callable[[], float]]
    repetitions: int


@dataclass
class Row:
    """One contender of one case: median, smallest and largest of its repetitions, all in microseconds."""

    group: str
    case: str
    contender: str
    median: float
    smallest: float
    largest: float
    difference: float
    ratio: float


def measure(case: Case) -> list[Row]:
    """Runs all contenders in turn, and once more before that to warm up."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for repetition in range(-1, case.repetitions):
        for name, run in case.contenders.items():
            gc.collect()
            value = run()
            if repetition >= 0:
                times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians[next(iter(medians))]
    return [
        Row(
            case.group, case.name, name, median, min(times[name]), max(times[name]),
            difference=median - reference, ratio=median / reference,
        )
        for name, median in medians.items()
    ]  # fmt: skip


def microseconds(
    function: Callable[[], object], calls: int, per_call: int = 1, setup: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """Times many calls of a function.

    Arguments:
        function: what is timed.
        calls: how often it is called for one measurement.
        per_call: steps within one call.
        setup: called before each call, and not timed.

    Returns:
        What runs the measurement and returns the microseconds per step.
    """

    def run() -> float:
        total = 0.0
        for _ in range(calls):
            setup()
            started = time.perf_counter()
            function()
            total += time.perf_counter() - started
        return total / (calls * per_call) * 1e6

    return run
