"""From a generator to numbers: the same code for the callback in training and for `diffx evaluate`.

A number is stored with its protocol: whatever changes the value is named beside it, and numbers of different protocols
have different fingerprints.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.data import DataSource, Images
from diffx.data.base import SplitName
from diffx.generate import Generator
from diffx.metrics import (
    Extractor,
    FrechetDistance,
    ImageMetrics,
    Statistics,
    Value,
    cached_statistics,
    standard_metrics,
)
from diffx.utils import DiffxError, Keys, write_text


@dataclass(frozen=True)
class Evaluation:
    """The values of one evaluation with their protocol.

    Arguments:
        values: metrics by name.
        protocol: all that the values depend on, JSON-like.
        fingerprint: the hash of the protocol, without the checkpoint's step and the training seed.
        seconds: how long it took.
    """

    values: dict[str, Value]
    protocol: dict[str, Any]
    fingerprint: str
    seconds: float

    def save(self, path: Path) -> None:
        """Writes one JSON file, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads what `save` wrote.

        Raises:
            DiffxError: if the file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            values = {name: Value(**value) for name, value in content.pop("values").items()}
            return cls(values=values, **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiffxError(f"the evaluation '{path}' is damaged ({error}); delete it and evaluate again") from error


class Evaluator:
    """Measures samples against a data set.

    Arguments:
        extractor: what features and logits come from.
        source: the data set.
        reference: the split that samples are compared with, "train" or "test".
        batch_size: samples per batch on each rank.
        nearest: whether to look for the nearest training image of each sample; holds the training images in memory.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: DataSource,
        reference: SplitName = "train",
        batch_size: int = 256,
        nearest: bool = False,
    ) -> None:
        self.extractor = extractor
        self.source = source
        self.reference: SplitName = reference
        self.batch_size = batch_size
        self.nearest = nearest
        self._statistics: Statistics | None = None

    def check(self) -> None:
        """Finds what would fail after hours of training: missing weights, images the extractor cannot take.

        Raises:
            DiffxError: with the remedy.
        """
        self.extractor.check(self.source.channels, self.source.image_size)

    @property
    def statistics(self) -> Statistics | None:
        """The statistics of the reference images; None if the extractor has no features."""
        if self._statistics is None and self.extractor.dim:
            images = self.source.split(self.reference)
            self._statistics = cached_statistics(
                lambda: in_batches(images, self.batch_size), self.extractor, images.fingerprint()
            )
        return self._statistics

    def __call__(
        self,
        generator: Generator,
        total: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, Value]:
        """Samples and measures.

        Arguments:
            generator: makes the samples 0 … total − 1.
            total: number of samples over all ranks.
            device: where to sample and extract.
            rank: this process.
            world_size: number of processes; all of them have to call it.
            on_batch: called with the number of samples done by this rank after each batch.

        Returns:
            Metrics by name, the same on every rank.
        """
        metrics = self._metrics(total, device, generator.num_classes)
        done = 0
        for index, label, images in generator.batches(total, self.batch_size, device, rank, world_size):
            metrics.update(images, label if generator.num_classes else None, index)
            done += len(index)
            if on_batch is not None:
                on_batch(done)
        return metrics.compute()

    def baselines(self, rank: int = 0, world_size: int = 1) -> dict[str, Value]:
        """What the Fréchet distance can be judged by: real images against real ones, and noise against real ones.

        The floor is the distance of the other split to the reference: what a model as good as the data would reach with
        as many samples. Noise is uniform in every pixel.

        Arguments:
            rank: this process.
            world_size: number of processes; all of them have to call it.

        Returns:
            `<fd>_floor` and `<fd>_noise`; empty if the extractor has no features.
        """
        reference = self.statistics
        if reference is None:
            return {}
        splits: dict[SplitName, SplitName] = {"train": "test", "test": "train"}
        other = self.source.split(splits[self.reference])
        total = min(len(other), 10_000)
        shape = (self.source.channels, self.source.image_size, self.source.image_size)

        def noise() -> Iterator[Tensor]:
            for index in torch.arange(total).split(self.batch_size):
                yield (Keys(0, index).uniform("noise-baseline", *shape) * 256).to(torch.uint8)

        def value(name: str, images: Iterable[Tensor]) -> Value:
            metrics = ImageMetrics(self.extractor, [FrechetDistance(f"{self.extractor.fd_name}_{name}", reference)])
            metrics.to(self.extractor.device)
            first = 0
            for i, batch in enumerate(images):
                if i % world_size == rank:
                    metrics.update(batch, None, torch.arange(first, first + len(batch)))
                first += len(batch)
            (found,) = metrics.compute().values()
            return found

        found = [value("floor", in_batches(other, self.batch_size, total)), value("noise", noise())]
        return {v.name: v for v in found}

    def protocol(self) -> dict[str, Any]:
        """What the values depend on, as far as it is the evaluator's business."""
        images = self.source.split(self.reference)
        return {
            **self.extractor.protocol(),
            "quantization": "uint8, rounded to nearest",
            "reference": {
                "data": self.source.name,
                "split": self.reference,
                "images": len(images),
                "fingerprint": images.fingerprint(),
            },
        }

    def _metrics(self, total: int, device: torch.device | str, num_classes: int) -> ImageMetrics:
        def pixels(name: SplitName) -> Tensor:
            return torch.cat(list(in_batches(self.source.split(name), self.batch_size))).to(device)

        self.extractor.to(device)
        metrics = standard_metrics(
            self.extractor,
            total,
            reference=self.statistics,
            num_classes=num_classes,
            training=pixels("train") if self.nearest else None,
            heldout=pixels("test") if self.nearest else None,
        )
        return ImageMetrics(self.extractor, metrics).to(device)


def in_batches(images: Images, batch_size: int, total: int | None = None) -> Iterator[Tensor]:
    """The first `total` images of a split in order, uint8 `[b, C, H, W]` at a time."""
    count = len(images) if total is None else min(total, len(images))
    for indices in torch.arange(count).split(batch_size):
        yield images.get(indices)["x"]
