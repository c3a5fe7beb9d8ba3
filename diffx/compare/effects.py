r"""Means over seeds and differences between arms, with intervals that tell what they stand on.

Over seeds: for values y_1 … y_n the interval of the mean is ȳ ± t_{n−1} · s / √n with s² = Σ (y_i − ȳ)² / (n − 1), and
the p-value that of T = ȳ √n / s. With differences d_i = a_i − b_i between runs of the same seed in place of y_i this is
the paired t test. Source: Student, *The Probable Error of a Mean*, Biometrika 6(1), 1908. Runs of the same seed share
initial weights, data order, times and noise, in training and in sampling: what they share cancels in d_i.

All evaluations of a comparison use the same sampling seed, so that the intervals are about other training seeds, at
this number of samples and against this reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from diffx.metrics import Value, paired
from diffx.utils import DiffxError

Interval = tuple[float, float]
LEVEL = 0.05
"""Verdicts err in at most this share of comparisons, and intervals miss as often."""


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of its uncertainty.

    Arguments:
        value: the number.
        interval: its 95 % interval; None where it cannot be told.
        over: what the interval is over: `seeds` (of training), `samples` (of one training), or empty.
        p: the two-sided p-value of its being 0; None where it cannot be told or is not asked.
    """

    value: float
    interval: Interval | None = None
    over: str = ""
    p: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


def mean_over_seeds(values: Sequence[Value]) -> Estimate:
    """The mean over seeds with its t interval; of one seed its value, with the interval over samples.

    The latter is value ± t · standard error, at this number of samples: the jackknife's over G blocks, with G − 1
    degrees of freedom.

    Arguments:
        values: one for each seed, finite.
    """
    if len(values) > 1:
        return t_interval([value.value for value in values])
    (value,) = values
    if value.stderr is None or not math.isfinite(value.stderr):
        return Estimate(value.value)
    freedom = max((len(value.blocks) if value.blocks else value.n) - 1, 1)
    half = _quantile(freedom) * value.stderr
    return Estimate(value.value, (value.value - half, value.value + half), "samples")


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of at least two values with its 95 % t interval, and the p-value of its being 0.

    Values that are all the same, but not 0, as shares of few images can be, tell nothing of how much others would
    differ: then there is no interval and no p-value.
    """
    n = len(values)
    mean = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    if not any(values):
        return Estimate(0.0, (0.0, 0.0), "seeds", 1.0)
    if stderr <= 1e-9 * abs(mean):
        return Estimate(mean, None, "seeds")
    half = _quantile(n - 1) * stderr
    return Estimate(mean, (mean - half, mean + half), "seeds", _p(mean, stderr, n - 1))


def between_seeds(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The difference a − b, paired by seed.

    Arguments:
        a: values of one arm, in the order of the seeds; at least two.
        b: those of the other, in the same order.
    """
    return t_interval([x - y for x, y in zip(a, b, strict=True)])


def between_samples(a: Value, b: Value) -> Estimate | None:
    """The difference a − b of one training each, over samples of the same noise: see `diffx.metrics.paired`.

    It says nothing about other training seeds.

    Returns:
        The estimate, None where there is no jackknife to pair.
    """
    try:
        effect = paired(a, b)
    except DiffxError:
        return None
    freedom = len(a.blocks or ()) - 1
    low, high = effect.interval
    return Estimate(
        effect.difference, (low, high), "samples", _p(effect.difference, (high - low) / 2 / _quantile(freedom), freedom)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those up to 0.05 are rejected with at most 5 % chance of any false rejection among all.

    The k-th smallest of m becomes the largest of (m − j + 1) · p_(j) for j ≤ k, at most 1.
    Source: Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, Scandinavian Journal of Statistics 6(2),
    1979.

    Arguments:
        p_values: one for each comparison; they may depend on each other.

    Returns:
        The adjusted ones, in the same order.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for k, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - k) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _quantile(freedom: int) -> float:
    return float(stdtrit(freedom, 1 - LEVEL / 2))


def _p(value: float, stderr: float, freedom: int) -> float:
    if not stderr:
        return 0.0 if value else 1.0  # as its interval says, which has no width
    return 2 * float(stdtr(freedom, -abs(value) / stderr))
