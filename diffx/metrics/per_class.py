"""The Fréchet distance class by class."""

import math

import torch

from diffx.metrics.accumulators import FeatureMoments, Moments
from diffx.metrics.base import ImageMetric, Observation, no_finite_features
from diffx.metrics.consistency import labels_of
from diffx.metrics.frechet import Gaussian
from diffx.metrics.reference import Reference, too_few
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed

_BYTES = 4 * 2**30


class PerClassFrechet(ImageMetric):
    r"""The Fréchet distance of the images of each class to the reference images of that class, and the mean of them.

    (1/K) Σ_c d²(samples asked to be of class c, reference of class c), with d² as in `FrechetDistance`. A class has few
    images, so that its distance is biased upwards: compare at equal numbers only. Source: Benny et al., *Evaluation
    Metrics for Conditional Image Generation*, arXiv 2004.12361 (WCFID). Use it when samples are conditional
    and a distance over all of them could hide a class that fails.

    Arguments:
        reference: what samples are compared with.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        statistics = reference.class_statistics
        self.name = reference.extractor.named("per_class_fd")
        self.class_name = reference.extractor.named("fd")
        self.classes = len(statistics)
        self.gaussians = torch.nn.ModuleList(Gaussian(s) for s in statistics)
        dim = reference.extractor.dim
        # without blocks there is no standard error
        self.blocks = BLOCKS if self.classes * BLOCKS * dim**2 * 8 <= _BYTES else 1
        centre = torch.stack([s.mean for s in statistics]).mean(dim=0)
        self.moments = FeatureMoments(centre, self.classes * self.blocks)

    def update(self, seen: Observation) -> None:
        """Takes the features and labels of a batch in.

        Raises:
            DiffxError: if there are no labels.
        """
        labels = labels_of(seen, self.name)
        asked = (labels >= 0) & (labels < self.classes)
        group = labels * self.blocks + block_of(seen.index) % self.blocks
        self.moments.update(seen.features[asked], group[asked])

    def compute(self) -> list[Value]:
        """The mean over the classes, with the worst one in its note, and one value for each class."""
        moments = self.moments.totals()
        method = f"float64, the reference taken as given; {self._uncertainty()}"
        values = [self._of_class(c, moments, method) for c in range(self.classes)]
        found = [v for v in values if v.n > 1]
        n = sum(v.n for v in values)
        if not found:
            note = "undefined: no image was asked to be of a class"
            return [Value(self.name, math.nan, None, n, f"mean over classes; {method}", note), *values]
        mean = math.fsum(v.value for v in found) / len(found)
        worst = max(range(self.classes), key=lambda c: values[c].value if values[c].n > 1 else -math.inf)
        note = no_finite_features(mean) or f"worst class {worst}: {values[worst].value:.4g}"
        if len(found) < self.classes:
            note += f"; only {len(found)} of {self.classes} classes have at least 2 images"
        few = [v for v in found if v.note]
        if few:
            note += f"; {len(few)} classes have too few images for their covariance"
        blocks = [v.blocks for v in found]
        whole = all(b is not None and len(b) == self.blocks for b in blocks)
        without = torch.tensor(blocks if whole else [], dtype=torch.float64).reshape(-1, self.blocks).mean(dim=0)
        method = f"mean over {len(found)} classes; {method}"
        return [jackknifed(self.name, mean, without, n, method, note), *values]

    def _of_class(self, c: int, moments: Moments, method: str) -> Value:
        mine = moments.groups(slice(c * self.blocks, (c + 1) * self.blocks))
        gaussian = self.gaussians[c]
        assert isinstance(gaussian, Gaussian)
        n = int(mine.count.sum())
        curve = gaussian.curve(mine, sorted({self.blocks, self.blocks - 1} - {0}))
        value, without = curve[self.blocks].item(), curve.get(self.blocks - 1, torch.empty(0))
        note = "undefined: at least 2 images are needed" if n < 2 else no_finite_features(value)
        name = f"{self.class_name}_class_{c}"
        return jackknifed(name, value, without, n, method, note or too_few(n, gaussian.n, len(gaussian.mean)))

    def _uncertainty(self) -> str:
        if self.blocks == 1:
            return "no standard error: the sums of its blocks would take more than 4 GiB"
        return f"± jackknife over {BLOCKS} blocks of images"
