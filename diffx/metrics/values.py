"""What a metric returns: a number that says how sure it is and how it was made."""

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
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
        stderr: one standard error of the value at this number of images, or `None` where it cannot be told.
        n: the number of images behind the value.
        method: how value and standard error were computed.
        note: what the reader has to know before comparing it; empty if nothing.
        bias: how far the value lies above its limit for n → ∞ on average; 0 for unbiased estimators, `None` where it
            cannot be told.
        interval: a 95 % interval for that limit; `None` where the bias cannot be told.
        blocks: the values without one jackknife block each, by which `paired` compares two sets of images.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    method: str
    note: str = ""
    bias: float | None = None
    interval: tuple[float, float] | None = None
    blocks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # JSON knows lists only
        for name in ("interval", "blocks"):
            content = getattr(self, name)
            object.__setattr__(self, name, None if content is None else tuple(content))

    def __str__(self) -> str:
        uncertainty = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{self.name} {self.value:.4g}{uncertainty}"


def jackknifed(
    name: str,
    value: float,
    without: Tensor,
    n: int,
    method: str,
    note: str = "",
    bias: float | None = None,
    extra: float = 0.0,
) -> Value:
    """A value with all that follows from its jackknife blocks.

    Arguments:
        name: see `Value`, as for `n`, `method`, `note` and `bias`.
        value: the statistic of all images.
        without: the statistic without one block each, shape `[G]`.
        n: the number of images.
        method: how it was computed.
        note: what the reader has to know.
        bias: as from `bias_at`; 0 for an unbiased statistic.
        extra: a standard error that the blocks do not show.
    """
    stderr = jackknife(without)
    if stderr is None:
        return Value(name, value, None, n, method, note)
    interval = None if bias is None else limit(value, without, bias, extra)
    return Value(name, value, math.hypot(stderr, extra), n, method, note, bias, interval, tuple(without.tolist()))


def jackknife(without: Tensor) -> float | None:
    r"""The standard error of a statistic from its delete-one-block values θ_1 … θ_G.

    sqrt((G − 1)/G · Σ_g (θ_g − θ̄)²), which leaves the bias of the statistic out, as the spread of repeated draws does.
    It never errs low on average. It does err high, up to √2-fold and with it the intervals, where the statistic is
    close to an extremum and so without a linear part: a Fréchet distance near 0, an Inception Score near its ceiling.
    Source: Efron and Stein, *The Jackknife Estimate of Variance*, Annals of Statistics 9(3), 1981.

    Arguments:
        without: the values without one block each, shape `[G]`.

    Returns:
        The standard error; `None` for fewer than two values or one that is not finite.
    """
    groups = len(without)
    if groups < 2 or not without.isfinite().all():
        return None
    return math.sqrt((groups - 1) * without.var(correction=0).item())


def bias_at(value: float, without: Tensor, halves: Tensor) -> float | None:
    r"""The bias of a statistic at its number of images, E[θ̂] − lim θ̂.

    The limit is that of θ + b/n + c/n² through the statistic of all G blocks, of G − 1 of them and of G/2 of them. The
    plain jackknife (Quenouille, *Notes on Bias in Estimation*, Biometrika 43, 1956) stops at b/n, and its intervals
    miss the limit of a Fréchet distance where there are less than about six images per feature.

    Arguments:
        value: the statistic of all images.
        without: its values without one block each, shape `[G]`.
        halves: its values on G // 2 blocks each, any number of them.

    Returns:
        The bias; `None` for fewer than four blocks or a value that is not finite.
    """
    groups = len(without)
    if groups < 4 or not (math.isfinite(value) and without.isfinite().all() and halves.isfinite().all()):
        return None
    half = groups // 2
    first = groups * value - (groups - 1) * without.mean().item()
    coarse = (groups * value - half * halves.mean().item()) / (groups - half)
    # Richardson: the two linear extrapolations miss by −c/(G(G − 1)) and −c/(G·half)
    return value - (first + (first - coarse) * half / (groups - 1 - half))


def limit(value: float, without: Tensor, bias: float, extra: float = 0.0) -> tuple[float, float]:
    r"""A 95 % interval for the limit of a statistic for n → ∞: value − bias ± t_{G−1} · sqrt(stderr² + (c-term / 2)²).

    Half of what the term c/n² of `bias_at` contributes stands for the terms that it leaves out. It is nothing where
    there are enough images, and widens the interval where there are few.

    Arguments:
        value: the statistic of all images.
        without: its values without one block each, shape `[G]`, finite.
        bias: its bias as from `bias_at`; exactly 0 says that the statistic is unbiased.
        extra: a standard error that the blocks do not show.
    """
    groups = len(without)
    second = bias - (groups - 1) * (without.mean().item() - value) if bias else 0.0
    half = float(stdtrit(groups - 1, 0.975)) * math.hypot(jackknife(without) or 0.0, second / 2, extra)
    return value - bias - half, value - bias + half


def unions(groups: int, size: int) -> Tensor:
    """Unions of `size` of the G blocks, float64 `[G, G]` of 0 and 1: row g leaves block g out and those before it."""
    order = torch.arange(groups)
    return ((order[None, :] - order[:, None] - 1) % max(groups, 1) < size).to(torch.float64)
