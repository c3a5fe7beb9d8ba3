"""The Kernel Inception Distance, with the subsets of torch-fidelity."""

import math

import numpy as np
import torch
from torch import Tensor

from diffx.metrics.accumulators import Reservoir
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.kernel import Polynomial, mmd2
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed


class KernelDistance(ImageMetric):
    r"""The maximum mean discrepancy of features under a cubic kernel: KID on Inception.

    The mean over subsets of the unbiased MMD² with k(x, y) = (x·y / D + 1)³. The subsets are those of torch-fidelity,
    drawn with `numpy.random.RandomState(2020)`, so that the value is its value. The standard error is not the spread
    over the subsets, which overlap and so agree too well, but the jackknife over blocks of images, each taken out of
    all subsets, and that of the choice of subsets. Source: Bińkowski et al., *Demystifying MMD GANs*, arXiv 1801.01401,
    section 4. Use it when there are too few images for a covariance: it is unbiased at any number of them.

    Arguments:
        reference: what samples are compared with.
        subsets: the number of subsets.
        subset_size: images in a subset; all where there are fewer.
        degree: the degree of the kernel.
        seed: the seed of the subsets.
        max_images: how many images are kept at most.
    """

    def __init__(
        self,
        reference: Reference,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        seed: int = 2020,
        max_images: int = 10_000,
    ) -> None:
        super().__init__()
        self.name = reference.extractor.named("kd")
        self.subsets = subsets
        self.subset_size = subset_size
        self.kernel = Polynomial(degree)
        self.seed = seed
        self.reference_features = reference.features
        self.kept = Reservoir(reference.total, reference.extractor.dim, max_images)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.kept.update(seen.features, seen.index)

    def compute(self) -> list[Value]:
        """One value: the mean MMD² over the subsets."""
        features, index = self.kept.totals()
        x, y = features.to(torch.float64), self.reference_features.to(features.device, torch.float64)
        size = min(self.subset_size, len(x), len(y))
        method = (
            f"mean unbiased MMD² over {self.subsets} subsets of {size} drawn by RandomState({self.seed}), on "
            f"{self.kept} and {len(y)} of the reference; ± jackknife over {BLOCKS} blocks of images and choice of "
            "subsets"
        )
        if size < 2:
            return [Value(self.name, math.nan, None, len(x), method, "undefined: at least 2 images are needed")]
        note = "" if size == self.subset_size else f"subsets of {size} images instead of {self.subset_size}"
        block, random = block_of(index), np.random.RandomState(self.seed)
        found = []
        # subsets of all images are one and the same
        for _ in range(1 if size == len(x) == len(y) else self.subsets):
            mine, theirs = (_subset(random, len(z), size).to(z.device) for z in (x, y))
            found.append(
                torch.cat([part.reshape(-1) for part in mmd2(x[mine], y[theirs], block[mine], BLOCKS, self.kernel)])
            )
        every = torch.stack(found).cpu()
        value, without = every[:, 0].mean().item(), every[:, 1:].mean(dim=0)
        # the choice of the reference's subsets shows in no block; close to 0 it counts
        chance = every[:, 0].std().item() / math.sqrt(len(every)) if len(every) > 1 else 0.0
        note = no_finite_features(value) or note
        return [jackknifed(self.name, value, without, len(x), method, note, 0.0, chance)]


def _subset(random: np.random.RandomState, count: int, size: int) -> Tensor:
    return torch.from_numpy(random.choice(count, size, replace=False))
