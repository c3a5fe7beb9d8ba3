"""What samples are compared with, each ingredient computed at first need and kept."""

import warnings
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from diffx.metrics.accumulators import FeatureMoments, Moments, Reservoir, kept_of
from diffx.metrics.base import Inapplicable
from diffx.metrics.cache import Cache
from diffx.metrics.extractors import Extractor, extract
from diffx.metrics.statistics import Statistics
from diffx.utils import DiffxError

_GIB = 2**30


class ImageSet(Protocol):
    """A finite set of images."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def get(self, indices: Tensor) -> dict[str, Tensor]:
        """`x`, uint8 `[b, C, H, W]`, and `label`, int64 `[b]`, of the images at these positions, int64 `[b]`."""
        ...

    def fingerprint(self) -> str:
        """What changes when the images or labels do; empty for images whose features shall not be cached."""
        ...


class Reference:
    """What samples are compared with.

    Where `torch.distributed` runs, every rank has to ask for the same ingredients in the same order: they compute them
    together, each its share of the images.

    Arguments:
        extractor: maps images to features and logits.
        reference: the images that samples are compared with; `None` where there is a file of statistics only.
        total: the number of samples to come; their sample numbers are 0 … total − 1.
        training: the images that the model was trained on.
        heldout: images that it was not trained on.
        num_classes: the number of classes of the data; 0 where they have no labels.
        batch_size: images per run of the extractor.
        statistics: the statistics of the reference, as published; computed from the images by default.
        max_features: how many reference images metrics on the features themselves use at most.
        cache_dir: where features and statistics are kept; the user's cache folder by default.
        progress: whether to show progress bars.

    Raises:
        DiffxError: if there are no samples to come, or the statistics are of another extractor.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: ImageSet | None,
        total: int,
        *,
        training: ImageSet | None = None,
        heldout: ImageSet | None = None,
        num_classes: int = 0,
        batch_size: int = 256,
        statistics: Statistics | None = None,
        max_features: int = 10_000,
        cache_dir: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        if total < 1:
            raise DiffxError(f"there are no metrics of {total} samples: ask for at least 1")
        if statistics is not None:
            statistics.check(extractor)
        self.extractor = extractor
        self.reference = reference
        self.total = total
        self.training = training
        self.heldout = heldout
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.max_features = max_features
        self.progress = progress
        self._given = statistics
        self._cache_dir = cache_dir
        self._collected: Tensor | None = None

    def check(self) -> None:
        """Finds what would fail or mislead, without running the extractor: warns of too few images.

        Raises:
            DiffxError: if the extractor does not take the images, or the sets differ in channels or size.
        """
        sets = {"reference": self.reference, "training": self.training, "held-out": self.heldout}
        shapes = {
            k: tuple(v.get(torch.tensor([0]))["x"].shape[1:]) for k, v in sets.items() if v is not None and len(v)
        }
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            raise DiffxError(f"images to compare must have one shape, but there are {told}: choose splits of one size")
        for channels, _, width in set(shapes.values()):
            self.extractor.check(channels, width)
        behind = self._given.n if self._given is not None else None if self.reference is None else len(self.reference)
        few = too_few(self.total, behind, self.extractor.dim)
        if few:
            warnings.warn(few, stacklevel=2)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the reference: as given, from the cache, or from all images in one pass.

        Raises:
            Inapplicable: if the extractor has no features, or there is neither a file nor images.
            DiffxError: if there are fewer than two images.
        """
        if self._given is not None and self.extractor.dim:
            return self._given
        images = self._images("statistics")

        def compute() -> Statistics:
            reservoir = Reservoir(len(images), self.extractor.dim, self.max_features)
            moments = self._pass(images, 1, reservoir)
            self._collected = reservoir.totals()[0].cpu()
            return self._statistics(moments, 0)

        found = self._cache(images).statistics(compute)
        if self._collected is not None:
            _ = self.features  # put into the cache what the pass found by the way
        return found

    @cached_property
    def features(self) -> Tensor:
        """The features of a seeded subset of the reference images, or of all if few: float32 `[m, D]`, on the CPU.

        Raises:
            Inapplicable: if the extractor has no features, or there are no images.
        """
        images = self._images("features")
        kept = kept_of(len(images), self.max_features)

        def compute() -> dict[str, Tensor]:
            if self._collected is not None:
                return {"features": self._collected}
            reservoir = Reservoir(len(images), self.extractor.dim, self.max_features).to(self.extractor.device)
            for index, features, _ in self._extracted(images, kept):
                reservoir.update(features, index)
            return {"features": reservoir.totals()[0].cpu()}

        shapes = {"features": (len(kept), self.extractor.dim)}
        return self._cache(images).tensors(f"features-{self.max_features}", shapes, compute)["features"]

    @cached_property
    def class_statistics(self) -> list[Statistics]:
        """The statistics of each class of the reference.

        Raises:
            Inapplicable: if there are no features, images or labels, or the covariances would take more than 4 GiB.
            DiffxError: if a class has fewer than two images.
        """
        images, classes, dim = self._images("statistics of each class"), self.num_classes, self.extractor.dim
        if classes < 1:
            raise Inapplicable("the reference has no classes: choose labelled data")
        size = classes * dim**2 * 8 / _GIB
        if size > 4:
            raise Inapplicable(
                f"the covariances of {dim} features for {classes} classes take {size:.0f} GiB and at most 4 are held: "
                "choose an extractor of fewer features"
            )

        def compute() -> dict[str, Tensor]:
            moments = self._pass(images, classes)
            found = [self._statistics(moments, c, f"class {c}: ") for c in range(classes)]
            return {
                "mean": torch.stack([s.mean for s in found]),
                "cov": torch.stack([s.cov for s in found]),
                "n": moments.count.to(torch.int64).cpu(),
            }

        shapes = {"mean": (classes, dim), "cov": (classes, dim, dim), "n": (classes,)}
        found = self._cache(images).tensors("classes", shapes, compute)
        return [self._described(*parts) for parts in zip(found["mean"], found["cov"], found["n"], strict=True)]

    @cached_property
    def training_images(self) -> Tensor:
        """All training images, uint8 `[N, C, H, W]`.

        Raises:
            Inapplicable: if there are none, or they would take more than 4 GiB.
        """
        if self.training is None or not len(self.training):
            raise Inapplicable("there are no training images to look for copies of: choose data with a training split")
        return self._pixels(self.training)

    @cached_property
    def heldout_images(self) -> Tensor | None:
        """All held-out images, uint8 `[M, C, H, W]`; `None` if there are none.

        Raises:
            Inapplicable: if they would take more than 4 GiB.
        """
        return self._pixels(self.heldout) if self.heldout is not None and len(self.heldout) else None

    def _images(self, what: str) -> ImageSet:
        if not self.extractor.dim:
            raise Inapplicable(f"extractor '{self.extractor.name}' has no features: choose another extractor")
        if self.reference is None:
            raise Inapplicable(
                f"the {what} of the reference need its images, and there is a file of statistics only: choose a split "
                "of the data as the reference"
            )
        return self.reference

    def _cache(self, images: ImageSet) -> Cache:
        return Cache(self.extractor, images.fingerprint(), self._cache_dir)

    def _extracted(self, images: ImageSet, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions, features and labels of this rank's share of the images."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = indices.split(self.batch_size)[rank::ranks]
        for index in track(mine, f"reference ({self.extractor.name})", disable=not self.progress or rank > 0):
            found = images.get(index)
            features = extract(self.extractor, found["x"])[0]
            yield index.to(features.device), features, found["label"].to(features.device)

    def _pass(self, images: ImageSet, classes: int, reservoir: Reservoir | None = None) -> Moments:
        """The moments of all images, by label where there is more than one class."""
        if len(images) < 2:
            raise DiffxError(f"statistics need at least 2 images, not {len(images)}: give a larger reference set")
        device = self.extractor.device
        batches = self._extracted(images, torch.arange(len(images)))
        first = list(islice(batches, 1))
        # any constant near the mean will do, if all ranks have the same
        centre = torch.zeros(self.extractor.dim, dtype=torch.float64, device=device)
        for _, features, _ in first:
            centre += features.to(torch.float64).mean(dim=0)
        if dist.is_initialized():
            dist.broadcast(centre, src=0)
        moments = FeatureMoments(centre, classes).to(device)
        if reservoir is not None:
            reservoir.to(device)
        for index, features, label in chain(first, batches):
            if classes > 1 and len(label) and not 0 <= int(label.min()) <= int(label.max()) < classes:
                raise DiffxError(f"the reference has labels beyond its {classes} classes: correct data.num_classes")
            moments.update(features, label if classes > 1 else torch.zeros_like(index))
            if reservoir is not None:
                reservoir.update(features, index)
        return moments.totals()

    def _statistics(self, moments: Moments, group: int, whose: str = "") -> Statistics:
        if moments.count[group] < 2:
            count = int(moments.count[group])
            raise DiffxError(f"{whose}statistics need at least 2 images, not {count}: give a larger reference set")
        chosen = torch.zeros_like(moments.count)
        chosen[group] = 1
        n, mean, cov = moments.of(chosen)
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise DiffxError(
                f"the features of the reference under extractor '{self.extractor.name}' are not finite: its weights "
                "are damaged, so fetch or fit them anew"
            )
        return self._described(mean.cpu(), cov.cpu(), torch.tensor(n))

    def _described(self, mean: Tensor, cov: Tensor, n: Tensor) -> Statistics:
        extractor, fingerprint = self.extractor, self._images("statistics").fingerprint()
        return Statistics(
            mean, cov, int(n), fingerprint, extractor.name, extractor.weights_hash, extractor.preprocessing
        )

    def _pixels(self, images: ImageSet) -> Tensor:
        shape = images.get(torch.tensor([0]))["x"].shape[1:]
        size = len(images) * shape.numel() / _GIB
        if size > 4:
            raise Inapplicable(
                f"{len(images)} images of {'x'.join(map(str, shape))} take {size:.0f} GiB and at most 4 are searched: "
                "leave the metric nearest out"
            )
        return torch.cat([images.get(index)["x"] for index in torch.arange(len(images)).split(self.batch_size)])


def too_few(n: int, reference_n: int | None, dim: int) -> str:
    """What to say where there are fewer images than a covariance of `dim` features needs; empty if there are enough."""
    counts = ((n, "images"), (reference_n, "reference images"))
    few = [f"{m} {which}" for m, which in counts if m is not None and m <= dim]
    if not few:
        return ""
    return (
        f"{' and '.join(few)} are too few for {dim} features (at least {dim + 1} are needed): the covariance is "
        "singular and the distance biased upwards, so compare at equal numbers only"
    )
