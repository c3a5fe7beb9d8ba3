r"""The Fréchet distance between two sets of images, seen as Gaussians in a feature space.

d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½ (Dowson and Landau, *The Fréchet distance between multivariate normal
distributions*, 1982, equation 4); with the features of Inception it is the FID (Heusel et al., *GANs Trained by a Two
Time-Scale Update Rule Converge to a Local Nash Equilibrium*, arXiv 1706.08500, equation 6). With Σ₂ = L Lᵀ the product
Σ₁ Σ₂ has the eigenvalues of the symmetric Lᵀ Σ₁ L, whose solver neither leaves the real numbers nor needs Σ to be
invertible.
"""

import math

import torch
from torch import Tensor

from diffx.metrics.accumulators import FeatureMoments, mean_and_covariance
from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.statistics import Statistics
from diffx.metrics.values import BLOCKS, Value, jackknife


def frechet_distance(images: Statistics, reference: Statistics) -> float:
    """The squared Fréchet distance between two sets of images.

    Arguments:
        images: the statistics of one set; the covariance may be singular.
        reference: the statistics of the other, in the same feature space.

    Returns:
        d² in squared units of the features, computed in float64; NaN if a number is not finite.
    """
    if not reference.cov.isfinite().all():
        return math.nan
    rank = _rank(images.n, images.cov)
    return _distance(images.mean, images.cov, rank, reference.mean, factor(reference.cov))


def factor(cov: Tensor) -> Tensor:
    """L of shape `[D, rank]` with L Lᵀ = cov, for a positive semi-definite `cov` of shape `[D, D]`."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    kept = eigenvalues > eigenvalues.max() * len(eigenvalues) * torch.finfo(cov.dtype).eps
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


class FrechetDistance(ImageMetric):
    """The Fréchet distance to a reference, with its jackknife standard error.

    Arguments:
        name: the name of the value, as `fid` or `fd_digits`.
        reference: the statistics of the reference images.
    """

    ref_mean: Tensor
    ref_cov: Tensor

    def __init__(self, name: str, reference: Statistics) -> None:
        super().__init__()
        self.name = name
        self.ref_n = reference.n
        self.register_buffer("ref_mean", reference.mean, persistent=False)
        self.register_buffer("ref_cov", reference.cov, persistent=False)
        self.moments = FeatureMoments(reference.mean)
        self._factor: Tensor | None = None

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.moments.update(seen.features, seen.index)

    def compute(self) -> list[Value]:
        """One value: the distance of all images seen."""
        count, first, second = self.moments.totals()
        total = int(count.sum())
        n, f, s = count.sum(), first.sum(dim=0), second.sum(dim=0)
        value = self._distance_of(n, f, s)
        present = [g for g in range(len(count)) if 0 < count[g] <= n - 2]
        without = [self._distance_of(n - count[g], f - first[g], s - second[g]) for g in present]
        stderr = jackknife(torch.tensor(without, dtype=torch.float64))
        method = f"float64; ± jackknife over {BLOCKS} blocks of images"
        return [Value(self.name, value, stderr, total, method, self._note(total, value))]

    def reset(self) -> None:
        """Forgets all images."""
        self.moments.reset()

    def _distance_of(self, count: Tensor, first: Tensor, second: Tensor) -> float:
        if count < 2:
            return math.nan
        if self._factor is None or self._factor.device != self.ref_cov.device:
            self._factor = factor(self.ref_cov)
        mean, cov = mean_and_covariance(count, first, second, self.moments.centre)
        return _distance(mean, cov, _rank(int(count), cov), self.ref_mean, self._factor)

    def _note(self, n: int, value: float) -> str:
        dim = len(self.ref_mean)
        if n < 2:
            return f"undefined for {n} images: at least 2 are needed"
        if value != value:
            return "the features are not finite: the extractor's weights are damaged"
        few = [f"{m} {which}" for m, which in ((n, "images"), (self.ref_n, "reference images")) if m and m <= dim]
        if few:
            return (
                f"{' and '.join(few)} are too few for {dim} features: the covariance is singular and the value biased "
                "upwards; compare at equal numbers only"
            )
        return ""


def _distance(mean: Tensor, cov: Tensor, rank: int, ref_mean: Tensor, ref_factor: Tensor) -> float:
    if not (mean.isfinite().all() and cov.isfinite().all()):
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(ref_factor.T @ cov @ ref_factor)
    # the root makes 1e-8 of a zero's rounding of 1e-16, and the product of singular covariances has many zeros
    root = eigenvalues[max(len(eigenvalues) - rank, 0) :].clamp(min=0).sqrt().sum()
    distance = (mean - ref_mean).square().sum() + cov.trace() + ref_factor.square().sum() - 2 * root
    return max(distance.item(), 0.0)


def _rank(n: int | None, cov: Tensor) -> int:
    return len(cov) if n is None else min(n - 1, len(cov))
