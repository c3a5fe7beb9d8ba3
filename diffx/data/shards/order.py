"""Which sample comes when: pure functions of (seed, n), so that ranks, workers and restarts cannot change them."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from diffx.utils import DiffxError
from diffx.utils.random import permutation

T = TypeVar("T")
_BLOCK = 1 << 16


class Order(ABC):
    """An endless sequence of rows of a table."""

    @abstractmethod
    def rows(self, n: Tensor) -> Tensor:
        """The rows at some places of the sequence.

        Arguments:
            n: places, int64 `[b]`, ascending.

        Returns:
            Rows of the table, int64 `[b]`.
        """

    @abstractmethod
    def shards(self, n: int) -> list[int]:
        """The shards that the rows at place n and soon after it are in, in the order of need."""


class Windows(Order):
    """Passes over rows that lie in shards, each row once per pass, in a random order with bounded reach.

    Pass e takes the shards in a random order, W at a time, and the rows of these W in a random order. So only W shards
    are read at a time, however many there are, and with W shards or fewer the order is uniform over all rows.

    Arguments:
        firsts: the first row in each shard, int64 `[S]`.
        counts: how many rows follow from there, int64 `[S]`; any numbers, with at least one row in all.
        window: W, shards that are mixed with each other; 0 for all of them.
        seed: keys the order.
        stream: keeps the orders of several sets apart.
    """

    def __init__(self, firsts: Tensor, counts: Tensor, window: int, seed: int, stream: str = "") -> None:
        self.kept = counts.nonzero()[:, 0]
        self.firsts, self.counts = firsts[self.kept], counts[self.kept]
        self.window = window or max(len(self.kept), 1)
        self.seed = seed
        self.stream = stream
        self.total = int(counts.sum())
        self._passes: _Recent[tuple[Tensor, list[int]]] = _Recent(3)
        self._windows: _Recent[Tensor] = _Recent(3)

    def rows(self, n: Tensor) -> Tensor:
        """The rows at some places; see `Order.rows`."""
        parts, start, highest = [], 0, int(n[-1])
        while start < len(n):
            first = int(n[start])
            e, within = divmod(first, self.total)
            ends = self._pass(e)[1]
            w = bisect_right(ends, within)
            base, limit = e * self.total + (ends[w - 1] if w else 0), e * self.total + ends[w]
            stop = len(n) if highest < limit else int(torch.searchsorted(n, limit))
            window = self._window(e, w)
            # mostly all of them are neighbours in one window
            if int(n[stop - 1]) - first == stop - 1 - start:
                parts.append(window[first - base : first - base + stop - start])
            else:
                parts.append(window[n[start:stop] - base])
            start = stop
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def shards(self, n: int) -> list[int]:
        """The shards of the window that place n is in, and of the next."""
        e, within = divmod(n, self.total)
        order, ends = self._pass(e)
        w = bisect_right(ends, within)
        ahead = order[w * self.window : (w + 2) * self.window].tolist()
        if w + 1 == len(ends):
            ahead += self._pass(e + 1)[0][: self.window].tolist()
        return self.kept[ahead].tolist()

    def _pass(self, e: int) -> tuple[Tensor, list[int]]:
        """The order of the shards in pass e, int64 `[S]`, and the place in the pass where each window ends."""

        def compute() -> tuple[Tensor, list[int]]:
            order = permutation(self.seed, f"shards{self.stream}", e, len(self.counts))
            ends = self.counts[order].cumsum(0)
            return order, torch.cat([ends[self.window - 1 :: self.window], ends[-1:]]).unique().tolist()

        return self._passes.get((e,), compute)

    def _window(self, e: int, w: int) -> Tensor:
        """The rows of window w of pass e, in order."""

        def compute() -> Tensor:
            shards = self._pass(e)[0][w * self.window : (w + 1) * self.window]
            counts = self.counts[shards]
            # row k of the window, before mixing: the first of its shard and what is left of k
            shift = (self.firsts[shards] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
            rows = shift + torch.arange(len(shift))
            return rows[permutation(self.seed, f"samples{self.stream}/{w}", e, len(rows))]

        return self._windows.get((e, w), compute)


class Mixed(Order):
    """Several orders in given shares: of each block of 65,536 units every order has exactly its share.

    Which units are whose is a random permutation; within its units each order goes on where it was, for ever.

    Arguments:
        orders: the K orders.
        weights: their weights, of any sum; all above 0.
        seed: keys who comes when.
        stream: keeps this choice apart from others.
        unit: places that belong together: 1 to draw for each sample, the global batch to draw for each step.

    Raises:
        DiffxError: if a weight is not above 0, or so small that its share of 65,536 rounds to nothing.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], seed: int, stream: str = "mixture", unit: int = 1
    ) -> None:
        self.orders = list(orders)
        self.shares = _shares(weights)
        self.seed = seed
        self.stream = stream
        self.unit = unit
        self._blocks: _Recent[tuple[Tensor, Tensor]] = _Recent(3)

    def rows(self, n: Tensor) -> Tensor:
        """The rows at some places; see `Order.rows`."""
        whose, place = self._places(n)
        rows = torch.empty_like(n)
        for k in whose.unique().tolist():
            mine = whose == k
            rows[mine] = self.orders[k].rows(place[mine])
        return rows

    def choice(self, n: int) -> int:
        """Whose place n is."""
        return int(self._places(torch.tensor([n]))[0])

    def shards(self, n: int) -> list[int]:
        """The shards that any of the orders needs next."""
        units = n // self.unit
        block = units // _BLOCK
        whose = self._block(block)[0]
        found = []
        for k, order in enumerate(self.orders):
            before = int((whose[: units % _BLOCK] == k).sum())
            found += order.shards((block * int(self.shares[k]) + before) * self.unit)
        return found

    def _places(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Whose each place is, and its place in their own sequence."""
        units = torch.div(n, self.unit, rounding_mode="floor")
        blocks = torch.div(units, _BLOCK, rounding_mode="floor")
        whose, place = torch.empty_like(n), torch.empty_like(n)
        for block in blocks.unique().tolist():
            inside = blocks == block
            owner, rank = self._block(block)
            slots = units[inside] % _BLOCK
            whose[inside] = owner[slots]
            place[inside] = (block * self.shares[owner[slots]] + rank[slots]) * self.unit + n[inside] % self.unit
        return whose, place

    def _block(self, block: int) -> tuple[Tensor, Tensor]:
        """Whose each unit of a block is, and which of its owner's units in the block it is, int64 `[65536]`."""

        def compute() -> tuple[Tensor, Tensor]:
            owner = torch.arange(len(self.shares)).repeat_interleave(self.shares)
            owner = owner[permutation(self.seed, self.stream, block, _BLOCK)]
            rank = torch.empty_like(owner)
            # sorted by owner they are numbered; a stable sort keeps their order
            first = self.shares.cumsum(0) - self.shares
            rank[owner.argsort(stable=True)] = torch.arange(_BLOCK) - first.repeat_interleave(self.shares)
            return owner, rank

        return self._blocks.get((block,), compute)


def _shares(weights: Sequence[float]) -> Tensor:
    """Whole numbers that add up to 65,536, by largest remainders, int64 `[K]`."""
    if any(not weight > 0 for weight in weights):
        raise DiffxError(f"data.weights is {list(weights)}; each must be above 0, so leave out what has no weight")
    exact = torch.tensor(weights, dtype=torch.float64)
    exact = exact / exact.sum() * _BLOCK
    shares = exact.floor().to(torch.int64)
    shares[(exact - shares).argsort(descending=True, stable=True)[: _BLOCK - int(shares.sum())]] += 1
    if shares.min() < 1:
        raise DiffxError(f"data.weights is {list(weights)}; the smallest share rounds to 0 of 65,536, so raise it")
    return shares


class _Recent(Generic[T]):
    """The values of a function at its last few arguments."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def get(self, key: tuple[int, ...], compute: Callable[[], T]) -> T:
        """The value kept, or the one computed now."""
        if key not in self.values:
            if len(self.values) == self.size:
                self.values.popitem(last=False)
            self.values[key] = compute()
        self.values.move_to_end(key)
        return self.values[key]
