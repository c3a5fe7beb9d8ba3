"""The maximum mean discrepancy that is meant for CLIP."""

import math

import torch

from diffx.metrics.accumulators import Reservoir
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.kernel import Gauss, mmd2
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed


class ClipMMD(ImageMetric):
    r"""The maximum mean discrepancy of normalized features under a Gaussian kernel: CMMD on CLIP.

    scale · MMD² with k(x, y) = exp(−‖x − y‖² / 2σ²) and features of length 1, by the unbiased estimator. The paper's
    code takes the biased one, which is larger by scale · ((1 − E k(x, x′)) / n + (1 − E k(y, y′)) / m) for n samples
    and m reference images, and resizes images by bicubic interpolation. Source: Jayasumana et al., *Rethinking FID:
    Towards a Better Evaluation Metric for Image Generation*, arXiv 2401.09603. Use it when images are natural scenes
    and the extractor is CLIP: σ and scale are made for it, and mean little elsewhere.

    Arguments:
        reference: what samples are compared with.
        sigma: σ.
        scale: what MMD² is multiplied by, for numbers that are easy to read.
        normalize: whether features are divided by their length.
        max_images: how many images are kept at most.
    """

    def __init__(
        self,
        reference: Reference,
        sigma: float = 10.0,
        scale: float = 1000.0,
        normalize: bool = True,
        max_images: int = 10_000,
    ) -> None:
        super().__init__()
        self.name = reference.extractor.named("cmmd")
        self.kernel = Gauss(sigma)
        self.scale = scale
        self.normalize = normalize
        self.reference_features = reference.features
        self.kept = Reservoir(reference.total, reference.extractor.dim, max_images)

    def update(self, seen: Observation) -> None:
        """Takes the features of a batch in."""
        self.kept.update(seen.features, seen.index)

    def compute(self) -> list[Value]:
        """One value: the scaled MMD²."""
        features, index = self.kept.totals()
        x, y = features.to(torch.float64), self.reference_features.to(features.device, torch.float64)
        lengths = "of length 1" if self.normalize else "as they are"
        method = (
            f"{self.scale:g} times unbiased MMD², Gaussian kernel of sigma {self.kernel.sigma:g} on features "
            f"{lengths}, on {self.kept} and {len(y)} of the reference; ± jackknife over {BLOCKS} blocks of images"
        )
        if min(len(x), len(y)) < 2:
            return [Value(self.name, math.nan, None, len(x), method, "undefined: at least 2 images are needed")]
        if self.normalize:
            x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
        value, without = mmd2(x, y, block_of(index), BLOCKS, self.kernel)
        value, without = self.scale * value.item(), self.scale * without.cpu()
        return [jackknifed(self.name, value, without, len(x), method, no_finite_features(value), 0.0)]
