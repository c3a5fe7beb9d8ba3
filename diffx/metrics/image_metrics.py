"""All metrics of one set of images: one pass, one run of the extractor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.consistency import ClassConsistency
from diffx.metrics.extractors import Extractor, extract
from diffx.metrics.frechet import FrechetDistance
from diffx.metrics.inception_score import InceptionScore
from diffx.metrics.nearest import NearestDistance
from diffx.metrics.statistics import Statistics
from diffx.metrics.values import Value


class ImageMetrics(nn.Module):
    """Metrics of images that come batch by batch, on any number of ranks.

    Keep it out of modules whose checkpoints should stay small: it holds the extractor's weights.

    Arguments:
        extractor: maps images to features and logits.
        metrics: what to measure, as from `standard_metrics`.
    """

    def __init__(self, extractor: Extractor, metrics: Sequence[ImageMetric]) -> None:
        super().__init__()
        self.extractor = extractor
        self.metrics = nn.ModuleList(metrics)

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor | None, index: Tensor) -> None:
        """Takes a batch in.

        Arguments:
            images: uint8 `[B, C, H, W]`.
            labels: the classes asked for, int64 `[B]`, or `None`.
            index: the global sample numbers, int64 `[B]`: each number once over all batches and ranks.

        Raises:
            TypeError: if the images are not uint8 `[B, C, H, W]`.
            ValueError: if a sample number is not below the announced total.
            DiffxError: if class consistency is measured and there are no labels.
        """
        features, logits = extract(self.extractor, images)
        device = features.device
        labels = labels if labels is None else labels.to(device)
        seen = Observation(images.to(device), labels, index.to(device), features, logits)
        for metric in self._metrics():
            metric.update(seen)

    @torch.no_grad()
    def compute(self) -> dict[str, Value]:
        """The values over all images of all ranks, by name; every rank has to call it and gets the same."""
        values = [value for metric in self._metrics() for value in metric.compute()]
        return {value.name: value for value in values}

    def reset(self) -> None:
        """Forgets all images."""
        for metric in self._metrics():
            metric.reset()

    def _metrics(self) -> list[ImageMetric]:
        return [metric for metric in self.metrics.children() if isinstance(metric, ImageMetric)]


def standard_metrics(
    extractor: Extractor,
    total: int,
    reference: Statistics | None = None,
    num_classes: int = 0,
    training: Tensor | None = None,
    heldout: Tensor | None = None,
) -> list[ImageMetric]:
    """The metrics that these ingredients allow.

    Fréchet distance where there is a reference, Inception Score where there are features, class consistency where the
    extractor tells the data's classes apart, distance to the nearest training image where training images are given.

    Arguments:
        extractor: maps images to features and logits.
        total: the number of images to come; their sample numbers are 0 … total − 1.
        reference: the statistics of the reference images under this extractor.
        num_classes: the number of classes of the data; 0 if they have no labels.
        training: training images, uint8 `[N, C, H, W]`.
        heldout: images that were not trained on, uint8 `[M, C, H, W]`.

    Raises:
        DiffxError: if the reference is of another extractor.
    """
    metrics: list[ImageMetric] = []
    if extractor.dim and reference is not None:
        reference.check(extractor)
        metrics.append(FrechetDistance(extractor.fd_name, reference))
    if extractor.dim:
        metrics.append(InceptionScore(extractor.is_name, extractor.num_classes, total))
    if num_classes and num_classes == extractor.num_classes:
        metrics.append(ClassConsistency(num_classes))
    if training is not None:
        metrics.append(NearestDistance(training, heldout))
    return metrics
