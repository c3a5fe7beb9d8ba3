r"""The Fréchet distance between two sets of images, seen as Gaussians in a feature space.

d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½ (Dowson and Landau, *The Fréchet distance between multivariate normal
distributions*, 1982, equation 4); with the features of Inception it is the FID (Heusel et al., *GANs Trained by a Two
Time-Scale Update Rule Converge to a Local Nash Equilibrium*, arXiv 1706.08500, equation 6). With Σ₂ = L Lᵀ the product
Σ₁ Σ₂ has the eigenvalues of the symmetric Lᵀ Σ₁ L, whose solver neither leaves the real numbers nor needs Σ to be
invertible.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffx.metrics.accumulators import FeatureMoments, Moments
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.reference import Reference, too_few
from diffx.metrics.statistics import Statistics
from diffx.metrics.values import BLOCKS, Value, bias_at, block_of, jackknifed, unions

_PER_FEATURE = 1.25  # with a block left out there still are more images than features


def frechet_distance(images: Statistics, reference: Statistics) -> float:
    """The squared Fréchet distance between two sets of images.

    Arguments:
        images: the statistics of one set; the covariance may be singular.
        reference: the statistics of the other, in the same feature space.

    Returns:
        d² in squared units of the features, computed in float64; NaN if a number is not finite.
    """
    return Gaussian(reference).distance(images.n, images.mean, images.cov)


class Gaussian(nn.Module):
    """The reference of Fréchet distances, with its covariance decomposed once.

    Arguments:
        statistics: mean and covariance of the reference images.
    """

    mean: Tensor
    cov: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.n = statistics.n
        self.register_buffer("mean", statistics.mean, persistent=False)
        self.register_buffer("cov", statistics.cov, persistent=False)
        self._factor: Tensor | None = None

    def smooth(self, moments: Moments) -> bool:
        """Whether distances of fewer images tell the limit: they are no smooth function of 1/n near n = D."""
        return len(moments.count) > 1 and int(moments.count.sum()) >= _PER_FEATURE * len(self.mean)

    @property
    def factor(self) -> Tensor:
        """L of shape `[D, rank]` with L Lᵀ = Σ₂."""
        factor = self._factor
        if factor is None or factor.device != self.cov.device:
            eigenvalues, eigenvectors = torch.linalg.eigh(self.cov)
            kept = eigenvalues > eigenvalues.max() * len(eigenvalues) * torch.finfo(self.cov.dtype).eps
            self._factor = factor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return factor

    def distance(self, n: int | None, mean: Tensor, cov: Tensor) -> float:
        """The squared Fréchet distance of n images with this mean `[D]` and covariance `[D, D]`; NaN if not finite."""
        if not all(x.isfinite().all() for x in (mean, cov, self.mean, self.cov)):
            return math.nan
        rank = len(cov) if n is None else n - 1
        return self._combined(rank, mean, cov.trace(), self.factor.T @ cov @ self.factor)

    def curve(self, moments: Moments, sizes: Iterable[int]) -> dict[int, Tensor]:
        """The squared distances of the unions of so many of the G blocks, NaN for unions of fewer than two images.

        Arguments:
            moments: the sums over each of G blocks.
            sizes: numbers of blocks.

        Returns:
            For each size the distances of `unions`, float64 `[G]`, and `[1]` where all blocks are one union.
        """
        groups = len(moments.count)
        if not all(x.isfinite().all() for x in (moments.first, moments.second, self.cov)):
            return {size: torch.full((1 if size == groups else groups,), math.nan).double() for size in sizes}
        # sums are linear: Lᵀ Σ₁ L of all unions takes the products for G blocks only
        factor = self.factor
        inner = Moments(moments.count, moments.first @ factor, factor.T @ moments.second @ factor, self.mean @ factor)
        squares = moments.second.diagonal(dim1=1, dim2=2).sum(dim=1)

        def distance(weights: Tensor) -> float:
            weights = weights.to(moments.count)
            n, first = weights @ moments.count, weights @ moments.first
            if n < 2:
                return math.nan
            trace = (weights @ squares - first.square().sum() / n) / (n - 1)
            return self._combined(int(n) - 1, moments.centre + first / n, trace, inner.of(weights)[2])

        curve = {}
        for size in sizes:
            weights = unions(groups, size) if size < groups else torch.ones(1, groups)
            curve[size] = torch.tensor([distance(row) for row in weights], dtype=torch.float64)
        return curve

    def _combined(self, rank: int, mean: Tensor, trace: Tensor, inner: Tensor) -> float:
        eigenvalues = torch.linalg.eigvalsh(inner)
        # the root makes 1e-8 of a zero's rounding of 1e-16, and the product of singular covariances has many zeros
        root = eigenvalues[max(len(eigenvalues) - rank, 0) :].clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + trace + self.factor.square().sum() - 2 * root
        return max(distance.item(), 0.0)


class FrechetDistance(ImageMetric):
    r"""The Fréchet distance between the Gaussians of features: FID on Inception.

    d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½, from sums over ten blocks of images, whose jackknife gives
    standard error, bias and an interval for n → ∞. The reference is taken as given: its own sampling is not part of
    them. Source: Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*,
    arXiv 1706.08500, equation 6. Use it when results are to be compared with the literature.

    Arguments:
        reference: what samples are compared with.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.name = reference.extractor.named("fd")
        self.gaussian = Gaussian(reference.statistics)
        self.moments = FeatureMoments(reference.statistics.mean, BLOCKS)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.moments.update(seen.features, block_of(seen.index))

    def compute(self) -> list[Value]:
        """One value: the distance of all images seen."""
        moments, groups = held_blocks(self.moments.totals())
        half = [groups // 2] if self.gaussian.smooth(moments) else []
        curve = self.gaussian.curve(moments, [groups, groups - 1, *half])
        value, bias, note = extrapolated(self.gaussian, moments, curve)
        method = f"float64; ± jackknife over {BLOCKS} blocks of images, the reference taken as given"
        return [jackknifed(self.name, value, curve[groups - 1], int(moments.count.sum()), method, note, bias)]


class FrechetInfinity(ImageMetric):
    r"""The Fréchet distance extrapolated to infinitely many images: FID∞ on Inception.

    d² is to first order linear in 1/n: distances of unions of 5 … 10 of ten blocks, whose sums add up, lie on a line
    over 1/n that meets 1/n = 0 at the value. Its standard error is the jackknife's; the second-order remainder of the
    line is told as the bias. Source: Chong and Forsyth, *Effectively Unbiased FID and Inception Score and Where to Find
    Them*, arXiv 1911.07023. Use it when arms with different numbers of images are to be compared.

    Arguments:
        reference: what samples are compared with.
        least: the smallest number of blocks in a union, of ten.
    """

    def __init__(self, reference: Reference, least: int = 5) -> None:
        super().__init__()
        if not 1 <= least < BLOCKS:
            raise ValueError(f"least must be a number of blocks in 1 … {BLOCKS - 1}, not {least}")
        self.name = reference.extractor.named("fd_infinity")
        self.least = least
        self.gaussian = Gaussian(reference.statistics)
        self.moments = FeatureMoments(reference.statistics.mean, BLOCKS)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.moments.update(seen.features, block_of(seen.index))

    def compute(self) -> list[Value]:
        """One value: the intercept of the line."""
        moments, groups = held_blocks(self.moments.totals())
        n = int(moments.count.sum())
        method = f"line through the distances of unions of {self.least} … {BLOCKS} of {BLOCKS} blocks over 1/n"
        if groups < BLOCKS or n < 2 * BLOCKS:
            note = f"undefined for {n} images: at least {2 * BLOCKS} are needed, two in each block"
            return [Value(self.name, math.nan, None, n, method, note)]
        sizes = range(groups, self.least - 1, -1)
        curve = self.gaussian.curve(moments, {*sizes, groups // 2})
        value, bias, note = extrapolated(self.gaussian, moments, curve)
        inverse = torch.tensor([groups / (size * n) for size in sizes], dtype=torch.float64)
        heights = torch.stack([curve[size].mean() for size in sizes])
        found = math.nan if value != value else _intercept(inverse, heights)
        # the limit is that of the distance itself, and so are its linear part and what it misses
        bias = None if bias is None else found - (value - bias)
        without = curve[groups - 1] - curve[groups - 1].mean() + found
        return [jackknifed(self.name, found, without, n, method, note, bias)]


def _intercept(x: Tensor, y: Tensor) -> float:
    slope = torch.cov(torch.stack([x, y]))[0, 1] / x.var()
    return (y.mean() - slope * x.mean()).item()


def held_blocks(moments: Moments) -> tuple[Moments, int]:
    """The blocks that hold images, and their number, which is less than all only for a handful of images."""
    held = moments.count > 0
    if not held.all():
        moments = moments.groups(held)
    return moments, len(moments.count)


def extrapolated(gaussian: Gaussian, moments: Moments, curve: dict[int, Tensor]) -> tuple[float, float | None, str]:
    """The distance of all images, its bias (`None` where there are too few to tell) and what to say about it."""
    groups, n, dim = len(moments.count), int(moments.count.sum()), len(gaussian.mean)
    value = curve[groups].item() if groups else math.nan
    if n < 2:
        return value, None, f"undefined for {n} images: at least 2 are needed"
    if value != value:
        return value, None, no_finite_features(value)
    _, mean, cov = moments.of(torch.ones_like(moments.count))
    notes = [too_few(n, gaussian.n, dim)]
    if cov.trace() <= 1e-12 * (mean - moments.centre).square().sum():
        notes.append("all images have the same features: the generator has collapsed")
    if gaussian.smooth(moments):
        return value, bias_at(value, curve[groups - 1], curve[groups // 2]), "; ".join(filter(None, notes))
    if n > dim:
        least = math.ceil(_PER_FEATURE * dim)
        notes.append(f"{n} images are too few to tell the limit of a distance in {dim} features: take {least}")
    return value, None, "; ".join(filter(None, notes))
