r"""Do samples lie where data lie, and are all data reached? Balls around images up to their k-th neighbour tell.

The balls around the images of a set, each as large as the distance to its k-th nearest neighbour in the set, stand for
where such images lie.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffx.metrics.accumulators import Reservoir
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed

_CHUNK = 2**23  # elements of float64: 64 MiB
_SURFACE = 1 + 1e-9  # a copy of the k-th neighbour lies on the ball's surface, and rounding must not throw it out

Found = tuple[Tensor, Tensor]
"""A value `[]`, and the values without one block each, `[BLOCKS]`."""


class PrecisionRecall(ImageMetric):
    r"""The share of samples within the balls of the data, and the share of data within the balls of the samples.

    As torch-fidelity has it, so that the values are its values. Source: Kynkäänniemi et al., *Improved Precision and
    Recall Metric for Assessing Generative Models*, arXiv 1904.06991, equations 1 and 2. Use it when you want to know
    whether a distance comes from bad samples or from missing modes. Both depend on the number of images: compare at
    equal numbers only.

    Arguments:
        reference: what samples are compared with.
        k: balls reach to the k-th nearest neighbour.
        max_images: how many images are kept at most.
    """

    def __init__(self, reference: Reference, k: int = 3, max_images: int = 10_000) -> None:
        super().__init__()
        self.names = [reference.extractor.named(name) for name in ("precision", "recall")]
        self.k = k
        self.reference_features = reference.features
        self.kept = Reservoir(reference.total, reference.extractor.dim, max_images)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.kept.update(seen.features, seen.index)

    def compute(self) -> list[Value]:
        """The values `precision` and `recall`."""
        return _values(self.names, self.k, self.kept, self.reference_features, self._found)

    def _found(self, x: Tensor, y: Tensor, block: Tensor) -> tuple[Found, Found]:
        reach = _reach(y, self.k)
        inside = torch.cat([(d <= reach).any(dim=1) for d in _squares(x, y)])
        reaches = _reaches(x, block, self.k)
        hits = x.new_zeros(1 + BLOCKS)
        for d in _squares(y, x):
            hits += torch.stack([(d <= reach).any(dim=1).sum() for reach in reaches])
        recall = torch.where(reaches.isnan().any(dim=1), math.nan, hits / len(y))
        return _mean(inside, block), (recall[0], recall[1:])


class DensityCoverage(ImageMetric):
    r"""How many balls of the data a sample lies in, and the share of the data whose balls hold a sample.

    Density is Σ_i Σ_j 1(x_i in the ball of y_j) / (k n), coverage the share of y_j whose ball holds an x_i. Unlike
    precision and recall they do not trust the balls of samples, which outliers blow up. Source: Naeem et al., *Reliable
    Fidelity and Diversity Metrics for Generative Models*, arXiv 2002.09797. Use it when samples or data have outliers.
    Coverage grows with the number of images: compare at equal numbers only.

    Arguments:
        reference: what samples are compared with.
        k: balls reach to the k-th nearest neighbour.
        max_images: how many images are kept at most.
    """

    def __init__(self, reference: Reference, k: int = 5, max_images: int = 10_000) -> None:
        super().__init__()
        self.names = [reference.extractor.named(name) for name in ("density", "coverage")]
        self.k = k
        self.reference_features = reference.features
        self.kept = Reservoir(reference.total, reference.extractor.dim, max_images)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.kept.update(seen.features, seen.index)

    def compute(self) -> list[Value]:
        """The values `density` and `coverage`."""
        return _values(self.names, self.k, self.kept, self.reference_features, self._found)

    def _found(self, x: Tensor, y: Tensor, block: Tensor) -> tuple[Found, Found]:
        reach = _reach(y, self.k)
        balls, held = [], x.new_zeros(BLOCKS, len(y))
        for d in _squares(x, y):
            inside = (d <= reach).to(x.dtype)
            held.index_add_(0, block[len(balls) : len(balls) + len(d)], inside)
            balls += inside.sum(dim=1).unbind()
        total = held.sum(dim=0)
        covered = (torch.stack([total, *(total - held)]) > 0).to(x.dtype).mean(dim=1)
        return _mean(torch.stack(balls) / self.k, block), (covered[0], covered[1:])


def _values(
    names: list[str],
    k: int,
    kept: Reservoir,
    reference: Tensor,
    found: Callable[[Tensor, Tensor, Tensor], tuple[Found, Found]],
) -> list[Value]:
    features, index = kept.totals()
    x, y = features.to(torch.float64), reference.to(features.device, torch.float64)
    method = (
        f"k = {k}, on {kept} and {len(y)} of the reference; ± jackknife over {BLOCKS} blocks of images, "
        "the reference taken as given"
    )
    least = min(len(x), len(y))
    if least <= k or not (x.isfinite().all() and y.isfinite().all()):
        note = f"undefined: more than {k} images are needed" if least <= k else no_finite_features(math.nan)
        return [Value(name, math.nan, None, len(x), method, note) for name in names]
    both = found(x, y, block_of(index))
    return [
        jackknifed(name, value.item(), without.cpu(), len(x), method)
        for name, (value, without) in zip(names, both, strict=True)
    ]


def _squares(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The squared distances of all pairs of `x` `[m, D]` and `y` `[n, D]`, some rows at a time, `[r, n]`."""
    own, other = x.square().sum(dim=1), y.square().sum(dim=1)
    step = max(_CHUNK // max(len(y), 1), 1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield (own[rows, None] + other - 2 * x[rows] @ y.T).clamp(min=0)


def _reach(x: Tensor, k: int) -> Tensor:
    """The squared distance of each to its k-th nearest neighbour, `[m]`: of k + 1 the nearest is itself."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _squares(x, x)]) * _SURFACE


def _reaches(x: Tensor, block: Tensor, k: int) -> Tensor:
    """`_reach` among all, and without one block each, `[1 + BLOCKS, m]`: −1 for the block's own, NaN if few remain."""
    columns = [(block == g).nonzero()[:, 0] for g in range(BLOCKS)]
    parts = []
    for d in _squares(x, x):
        # the k + 1 nearest of every block hold the k + 1 nearest of any union of blocks
        nearest = [d[:, own].topk(min(k + 1, len(own)), dim=1, largest=False).values for own in columns]
        kept = [nearest, *([n for h, n in enumerate(nearest) if h != g] for g in range(BLOCKS))]
        parts.append(torch.stack([_kth(torch.cat(some, dim=1), k + 1) for some in kept]))
    reaches = torch.cat(parts, dim=1) * _SURFACE
    for g, own in enumerate(columns):
        reaches[1 + g, own] = -1
    return reaches


def _kth(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(k, dim=1).values if values.shape[1] >= k else values.new_full((len(values),), math.nan)


def _mean(values: Tensor, block: Tensor) -> Found:
    """The mean of `[m]`, and the means without one block each."""
    member = torch.nn.functional.one_hot(block, BLOCKS).to(torch.float64)
    count, sums = member.sum(dim=0), values.to(torch.float64) @ member
    return sums.sum() / count.sum(), (sums.sum() - sums) / (count.sum() - count)
