r"""The Fréchet distance between two sets of images, seen as Gaussians in a feature space.

d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½ (Dowson and Landau, *The Fréchet distance between multivariate normal
distributions*, 1982, equation 4); with the features of Inception it is the FID (Heusel et al., *GANs Trained by a Two
Time-Scale Update Rule Converge to a Local Nash Equilibrium*, arXiv 1706.08500, equation 6). With Σ₂ = L Lᵀ the product
Σ₁ Σ₂ has the eigenvalues of the symmetric Lᵀ Σ₁ L, whose solver neither leaves the real numbers nor needs Σ to be
invertible.
"""

import math

import torch
from torch import Tensor, nn

from diffx.metrics.accumulators import FeatureMoments, Moments
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.reference import Reference, too_few
from diffx.metrics.statistics import Statistics
from diffx.metrics.values import BLOCKS, Value, bias_at, block_of, jackknifed, unions


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

    def distance(self, n: int | None, mean: Tensor, cov: Tensor) -> float:
        """The squared Fréchet distance of n images with this mean `[D]` and covariance `[D, D]`; NaN if not finite."""
        if not all(x.isfinite().all() for x in (mean, cov, self.mean, self.cov)):
            return math.nan
        if self._factor is None or self._factor.device != self.cov.device:
            self._factor = _factor(self.cov)
        rank = len(cov) if n is None else min(n - 1, len(cov))
        eigenvalues = torch.linalg.eigvalsh(self._factor.T @ cov @ self._factor)
        # the root makes 1e-8 of a zero's rounding of 1e-16, and the product of singular covariances has many zeros
        root = eigenvalues[max(len(eigenvalues) - rank, 0) :].clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + cov.trace() + self._factor.square().sum() - 2 * root
        return max(distance.item(), 0.0)

    def distances(self, moments: Moments, weights: Tensor) -> Tensor:
        """The distances of unions of blocks, float64 `[S]`; NaN for a union of fewer than two images.

        Arguments:
            moments: the sums over each of G blocks.
            weights: 1 for the blocks of each union, `[S, G]`.
        """
        enough = (weights.to(moments.count) @ moments.count) > 1
        found = [self.distance(*moments.of(w)) if e else math.nan for w, e in zip(weights, enough, strict=True)]
        return torch.tensor(found, dtype=torch.float64)


def _factor(cov: Tensor) -> Tensor:
    """L of shape `[D, rank]` with L Lᵀ = cov, for a positive semi-definite `cov` of shape `[D, D]`."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    kept = eigenvalues > eigenvalues.max() * len(eigenvalues) * torch.finfo(cov.dtype).eps
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


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
        value = self.gaussian.distances(moments, torch.ones(1, groups)).item()
        without = self.gaussian.distances(moments, unions(groups, groups - 1))
        bias, note = extrapolated(self.gaussian, moments, value, without)
        method = f"float64; ± jackknife over {BLOCKS} blocks of images, the reference taken as given"
        return [jackknifed(self.name, value, without, int(moments.count.sum()), method, note, bias)]


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
        value = self.gaussian.distances(moments, torch.ones(1, groups)).item()
        without = self.gaussian.distances(moments, unions(groups, groups - 1))
        curve = {groups: value, groups - 1: without.mean().item()}
        for size in range(self.least, groups - 1):
            curve[size] = self.gaussian.distances(moments, unions(groups, size)).mean().item()
        inverse = torch.tensor([groups / (size * n) for size in curve], dtype=torch.float64)
        line = torch.stack([torch.ones_like(inverse), inverse], dim=1)
        heights = torch.tensor(list(curve.values()), dtype=torch.float64)
        found = torch.linalg.lstsq(line, heights[:, None]).solution[0].item() if heights.isfinite().all() else math.nan
        bias, note = extrapolated(self.gaussian, moments, value, without)
        # the limit is that of the distance itself, and so are its linear part and what it misses
        bias = None if bias is None else found - (value - bias)
        return [jackknifed(self.name, found, without + (found - without.mean()), n, method, note, bias)]


def held_blocks(moments: Moments) -> tuple[Moments, int]:
    """The blocks that hold images, and their number, which is less than all only for a handful of images."""
    held = moments.count > 0
    if not held.all():
        moments = moments.groups(held)
    return moments, len(moments.count)


def extrapolated(gaussian: Gaussian, moments: Moments, value: float, without: Tensor) -> tuple[float | None, str]:
    """The bias of a Fréchet distance, `None` where there are too few images to tell, and what to say about it."""
    n, dim = int(moments.count.sum()), len(gaussian.mean)
    if n < 2:
        return None, f"undefined for {n} images: at least 2 are needed"
    if value != value:
        return None, no_finite_features(value)
    _, mean, cov = moments.of(torch.ones_like(moments.count))
    notes = [too_few(n, gaussian.n, dim)]
    if cov.trace() <= 1e-12 * (mean - moments.centre).square().sum():
        notes.append("all images have the same features: the generator has collapsed")
    # the distance is no smooth function of 1/n where a delete-one-block covariance is singular
    if n < 1.25 * dim:
        return None, "; ".join(note for note in notes if note) or (
            f"{n} images are too few to tell the limit of a distance in {dim} features: at least "
            f"{math.ceil(1.25 * dim)} are needed"
        )
    groups = len(without)
    halves = gaussian.distances(moments, unions(groups, groups // 2))
    return bias_at(value, without, halves), "; ".join(note for note in notes if note)
