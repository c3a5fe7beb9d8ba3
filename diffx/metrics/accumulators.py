"""Sums over images: exact under any split into batches and ranks, saved and restored at any point."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffx.utils.random import permutation


class Sums(nn.Module):
    """Named tensors to which batches add; over several ranks the totals are what all of them added.

    Arguments:
        zeros: each sum before the first batch; its shape and type are the sum's.
    """

    def __init__(self, **zeros: Tensor) -> None:
        super().__init__()
        self.names = tuple(zeros)
        for name, zero in zeros.items():
            self.register_buffer(name, zero, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def update(self, **terms: Tensor) -> None:
        """Adds one tensor to each sum; its shape is the sum's."""
        for name, term in terms.items():
            self[name].add_(term.to(self[name]))

    def totals(self) -> dict[str, Tensor]:
        """The sums over all ranks, by name; every rank has to call it. The rank's own sums stay as they are."""
        totals = {name: self[name] for name in self.names}
        if dist.is_initialized() and dist.get_world_size() > 1:
            # added up where they are: gathering 335 MB of second moments from all ranks would not do
            totals = {name: total.clone() for name, total in totals.items()}
            for total in totals.values():
                dist.all_reduce(total)
        return totals

    def load(self, totals: dict[str, Tensor]) -> None:
        """Takes sums over.

        Raises:
            ValueError: if a sum is missing or has another shape.
        """
        for name in self.names:
            if name not in totals or totals[name].shape != self[name].shape:
                raise ValueError("the saved sums are of other metrics or another number of images: start anew")
            self[name].copy_(totals[name])

    def reset(self) -> None:
        """Sets all sums to 0."""
        for name in self.names:
            self[name].zero_()


@dataclass(frozen=True)
class Moments:
    """What `FeatureMoments` found: count `[G]`, Σ (f − c) `[G, D]`, Σ (f − c)(f − c)ᵀ `[G, D, D]` and c `[D]`."""

    count: Tensor
    first: Tensor
    second: Tensor
    centre: Tensor

    def groups(self, which: Tensor | slice) -> "Moments":
        """The sums of some of the groups."""
        return Moments(self.count[which], self.first[which], self.second[which], self.centre)

    def of(self, weights: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number, mean `[D]` and unbiased covariance `[D, D]` of the features of some groups.

        Arguments:
            weights: 1 for the groups that belong to it and 0 for the others, shape `[G]`; at least two features.
        """
        weights = weights.to(self.count)
        n, first = weights @ self.count, weights @ self.first
        second = torch.tensordot(weights, self.second, dims=1)
        shift = first / n
        covariance = (second - torch.outer(shift, first)) / (n - 1)
        return int(n), self.centre + shift, (covariance + covariance.T) / 2


class FeatureMoments(nn.Module):
    r"""Count, Σ (f − c) and Σ (f − c)(f − c)ᵀ of features f in float64, for each group of images.

    The constant c should lie near the mean: it takes the cancellation out of the covariance Σ ffᵀ/n − μμᵀ.

    Arguments:
        centre: c, shape `[D]`.
        groups: the number of groups G.
    """

    centre: Tensor

    def __init__(self, centre: Tensor, groups: int) -> None:
        super().__init__()
        dim = len(centre)
        self.groups = groups
        self.register_buffer("centre", centre.to(torch.float64), persistent=False)
        shapes = {"count": (groups,), "first": (groups, dim), "second": (groups, dim, dim)}
        zeros = {k: torch.zeros(v, dtype=torch.float64, device=centre.device) for k, v in shapes.items()}
        self.sums = Sums(**zeros)

    def update(self, features: Tensor, group: Tensor) -> None:
        """Adds a batch.

        Arguments:
            features: shape `[B, D]`.
            group: the group of each image, int64 `[B]`.
        """
        if len(features) == 0:
            return
        order = group.argsort(stable=True)
        group = group[order]
        count = torch.bincount(group, minlength=self.groups)
        place = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
        # a batch of matrix products, the groups filled up with zeros: several times faster than group by group
        padded = self.sums["first"].new_zeros(self.groups, int(count.max()), features.shape[1])
        padded[group, place] = features.to(torch.float64)[order] - self.centre
        self.sums["count"].add_(count)
        self.sums["first"].add_(padded.sum(dim=1))
        self.sums["second"].baddbmm_(padded.mT, padded)

    def totals(self) -> Moments:
        """The sums over all ranks."""
        return Moments(**self.sums.totals(), centre=self.centre)


class Reservoir(nn.Module):
    """The features of a bounded number of images, for metrics that need the features themselves.

    Which ones are kept follows from the sample number and the total alone: the same on any number of ranks, and common
    to two arms. All are kept, in their order, if they fit.

    Arguments:
        total: the number of images; their sample numbers are 0 … total − 1.
        dim: the number D of features.
        capacity: the largest number of images that are kept.
    """

    slot: Tensor
    index: Tensor

    def __init__(self, total: int, dim: int, capacity: int) -> None:
        super().__init__()
        self.total = total
        kept = kept_of(total, capacity)
        slot = torch.full((total,), -1, dtype=torch.int64)
        slot[kept] = torch.arange(len(kept))
        self.register_buffer("slot", slot, persistent=False)
        self.register_buffer("index", kept, persistent=False)
        seen = torch.zeros(len(kept), dtype=torch.int64)
        self.sums = Sums(features=torch.zeros(len(kept), dim), seen=seen)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Takes a batch in.

        Arguments:
            features: shape `[B, D]`; kept as float32.
            index: the global sample numbers, int64 `[B]`.

        Raises:
            ValueError: if a sample number is not below the total.
        """
        slot = self.slot[announced(index, self.total)]
        chosen = slot >= 0
        self.sums["features"][slot[chosen]] = features[chosen].to(torch.float32)
        self.sums["seen"][slot[chosen]] = 1

    def totals(self) -> tuple[Tensor, Tensor]:
        """The kept features over all ranks, float32 `[n, D]`, and their sample numbers `[n]`, in ascending order."""
        totals = self.sums.totals()
        seen = totals["seen"] > 0
        return totals["features"][seen], self.index[seen]

    def __str__(self) -> str:
        kept = len(self.index)
        return "all images" if kept == self.total else f"{kept} of {self.total} images, chosen by their sample numbers"


def kept_of(total: int, capacity: int) -> Tensor:
    """The sample numbers that a reservoir keeps, int64 in ascending order."""
    if total <= capacity:
        return torch.arange(total)
    return permutation(0, "metrics/reservoir", 0, total)[:capacity].sort().values


def announced(index: Tensor, total: int) -> Tensor:
    """The sample numbers, once it is sure that all are below the announced total.

    Raises:
        ValueError: if one is not.
    """
    if len(index) and int(index.max()) >= total:
        raise ValueError(f"sample {int(index.max())} is not among the {total} announced")
    return index
