r"""The maximum mean discrepancy, and what is left of it without one block of images each.

MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y), by its unbiased estimator, which leaves the diagonals out. Source: Gretton
et al., *A Kernel Two-Sample Test*, JMLR 13, 2012, equation 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 2**23  # elements of float64: 64 MiB


class Kernel(Protocol):
    """A positive definite function of two feature vectors."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The values k of all pairs of `x` `[m, D]` and `y` `[n, D]`, shape `[m, n]`."""
        ...

    def diagonal(self, x: Tensor) -> Tensor:
        """The values k(x, x), shape `[m]`."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """(x·y / D + 1)^degree."""

    degree: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs; see `Kernel`."""
        return (x @ y.T / x.shape[1] + 1) ** self.degree

    def diagonal(self, x: Tensor) -> Tensor:
        """Each with itself; see `Kernel`."""
        return (x.square().sum(dim=1) / x.shape[1] + 1) ** self.degree


@dataclass(frozen=True)
class Gauss:
    """exp(−‖x − y‖² / 2σ²)."""

    sigma: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs; see `Kernel`."""
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
        return torch.exp(-squares.clamp(min=0) / (2 * self.sigma**2))

    def diagonal(self, x: Tensor) -> Tensor:
        """Each with itself; see `Kernel`."""
        return torch.ones_like(x[:, 0])


def mmd2(x: Tensor, y: Tensor, block: Tensor, groups: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """MMD² between two sets of features, and between the first without one block each and the second.

    Arguments:
        x: the features of the images, float64 `[m, D]`, m ≥ 2.
        y: those of the reference, float64 `[n, D]`, n ≥ 2.
        block: the block of each image, int64 `[m]`.
        groups: the number G of blocks.
        kernel: k.

    Returns:
        The estimate, shape `[]`, and the estimates without each block, `[G]`.
    """
    member = torch.nn.functional.one_hot(block, groups).to(x.dtype)
    within, across = x.new_zeros(groups, groups), x.new_zeros(groups)
    for rows in _chunks(len(x), max(len(x), len(y))):
        within += member[rows].T @ kernel(x[rows], x) @ member
        across += member[rows].T @ kernel(x[rows], y).sum(dim=1)
    own = member.T @ kernel.diagonal(x)
    n = len(y)
    among = torch.stack([kernel(y[rows], y).sum() for rows in _chunks(n, n)]).sum() - kernel.diagonal(y).sum()

    def estimate(m: Tensor, pairs: Tensor, crossed: Tensor) -> Tensor:
        return pairs / (m * (m - 1)) + among / (n * (n - 1)) - 2 * crossed / (m * n)

    count, pairs = member.sum(dim=0), within.sum() - own.sum()
    rest = pairs - 2 * within.sum(dim=1) + within.diagonal() + own
    value = estimate(count.sum(), pairs, across.sum())
    return value, estimate(count.sum() - count, rest, across.sum() - across)


def _chunks(length: int, width: int) -> Iterator[slice]:
    step = max(_CHUNK // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, length, step))
