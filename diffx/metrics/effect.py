"""The difference that an arm makes, from two values on the same sample numbers."""

import math
from dataclasses import dataclass

import torch

from diffx.metrics.values import Value, jackknife, limit
from diffx.utils import DiffxError


@dataclass(frozen=True)
class Effect:
    """The difference of a metric between two sets of images, and whether it is one.

    Arguments:
        difference: of the limits for n → ∞ where the metric tells its bias, else of the values at this n.
        stderr: one standard error of it.
        interval: its 95 % interval.
        n: the number of images behind each of the two values.
    """

    difference: float
    stderr: float
    interval: tuple[float, float]
    n: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        low, high = self.interval
        return low > 0 or high < 0

    def __str__(self) -> str:
        low, high = self.interval
        half = (high - low) / 2
        digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 2
        text = f"{self.difference:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        return text if self.distinguishable else f"{text}, not distinguishable at n = {self.n}"


def paired(a: Value, b: Value) -> Effect:
    """The difference a − b of one metric between two sets of images with common random numbers.

    Sample k of both sets came from the same noise and label, so that a block of one is like the same block of the
    other: what they share cancels in the differences of the delete-one-block values, whose jackknife is the standard
    error.

    Arguments:
        a: the value of one set of images.
        b: the value of the other.

    Raises:
        DiffxError: if the two are of different metrics or numbers of images, or have no jackknife blocks.
    """
    if a.name != b.name:
        raise DiffxError(f"'{a.name}' and '{b.name}' are different metrics: compare the same metric of both arms")
    if a.n != b.n:
        raise DiffxError(f"{a.name} stands on {a.n} images here and {b.n} there: evaluate both arms on equally many")
    if a.blocks is None or b.blocks is None or len(a.blocks) != len(b.blocks):
        raise DiffxError(
            f"{a.name} has no jackknife blocks to pair: choose a metric with a standard error, and evaluate both arms "
            "on all samples"
        )
    value = a.value - b.value
    without = torch.tensor(a.blocks, dtype=torch.float64) - torch.tensor(b.blocks, dtype=torch.float64)
    stderr = jackknife(without)
    if stderr is None or not math.isfinite(value):
        raise DiffxError(f"{a.name} is undefined in one of the arms: see the value's note")
    bias = 0.0 if a.bias is None or b.bias is None else a.bias - b.bias
    return Effect(value - bias, stderr, limit(value, without, bias), a.n)
