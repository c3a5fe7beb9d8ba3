"""What a metric returns: a number that says how sure it is and how it was made."""

import math
from dataclasses import dataclass

from torch import Tensor

from diffx.utils.random import mix64

BLOCKS = 10
"""Jackknife blocks; `block_of` says which image belongs to which."""


def block_of(index: Tensor) -> Tensor:
    """The block of each image: ten consecutive ones fall into ten blocks, in an order that changes from ten to ten.

    Not the last digit of the sample number: classes are dealt out in turn, so that every tenth image of ten classes is
    of one class, and leaving it out no small change.

    Arguments:
        index: global sample numbers, int64 of any shape.

    Returns:
        Numbers in 0 … BLOCKS − 1, of the same shape, whatever the batches and the ranks.
    """
    return (index + mix64(index // BLOCKS) % BLOCKS) % BLOCKS


@dataclass(frozen=True)
class Value:
    """One metric of one set of images.

    Arguments:
        name: the metric, as `fid` or `fd_digits`.
        value: the number; NaN where it is undefined, with the reason in `note`.
        stderr: one standard error (multiply by 2.26 for a 95 % interval where it stands on 10 jackknife blocks), or
            `None` where it cannot be told.
        n: the number of images behind the value.
        method: how value and standard error were computed.
        note: what the reader has to know before comparing it; empty if nothing.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    method: str
    note: str = ""

    def __str__(self) -> str:
        uncertainty = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{self.name} {self.value:.4g}{uncertainty}"


def jackknife(estimates: Tensor) -> float | None:
    r"""The standard error of a statistic from its delete-one-block values θ_1 … θ_G.

    sqrt((G − 1)/G · Σ_g (θ_g − θ̄)²), which leaves the bias of the statistic out, as the spread of repeated draws does.
    It never errs low on average. It does err high, up to about twofold, where the statistic is close to an extremum and
    so without a linear part: a Fréchet distance near its floor, an Inception Score near its ceiling.
    Source: Efron and Stein, *The Jackknife Estimate of Variance*, Annals of Statistics 9(3), 1981.

    Arguments:
        estimates: the values without one block each, shape `[G]`.

    Returns:
        The standard error; `None` for fewer than two values or one that is not finite.
    """
    groups = len(estimates)
    if groups < 2 or not estimates.isfinite().all():
        return None
    return math.sqrt((groups - 1) * estimates.var(correction=0).item())
