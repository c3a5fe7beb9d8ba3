"""From a generator to numbers: the same code for the callback in training and for `diffx evaluate`."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffx.data import DataSource, Images
from diffx.data.base import SplitName
from diffx.generate import Generator
from diffx.metrics import Extractor, ImageMetric, ImageMetrics, Inapplicable, Reference, Statistics, Value
from diffx.utils import DiffxError, Keys, atomic_path

MakeMetric = Callable[[Reference], ImageMetric]
"""What `configs/metrics/*.yaml` build."""


@dataclass(frozen=True)
class Measured:
    """What an evaluator returns.

    Arguments:
        values: metrics by name, the same on every rank.
        omitted: metrics that these ingredients do not allow, with the reason.
        seconds: `sampling`, `extraction` and `rest`.
        metrics: the metrics themselves, for pictures of what they found.
        made: the number of samples that this process has made, those of an earlier session left out.
    """

    values: dict[str, Value]
    omitted: dict[str, str]
    seconds: dict[str, float]
    metrics: ImageMetrics
    made: int = 0


class Interrupted(Exception):  # noqa: N818 (nothing has gone wrong)
    """An evaluation was asked to stop, and has saved what it had.

    Arguments:
        done: the number of samples measured so far.
        signal: the number of the signal that asked, the same on all ranks.
    """

    def __init__(self, done: int, signal: int) -> None:
        super().__init__(f"stopped after {done} samples")
        self.done = done
        self.signal = signal


class Evaluator:
    """Measures samples against a data set.

    Arguments:
        extractor: what features and logits come from.
        source: the data set.
        metrics: makes each metric, by its name in the config.
        reference: what samples are compared with: the split "train" or "test", or the path of an `.npz` file with the
            statistics (`mu`, `sigma`), as published with ADM, EDM or clean-fid, or written by `diffx reference`.
        batch_size: samples per batch on each rank.
        save_every: samples between two snapshots from which a killed evaluation goes on.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: DataSource,
        metrics: Mapping[str, MakeMetric],
        reference: str = "train",
        batch_size: int = 256,
        save_every: int = 10_000,
    ) -> None:
        self.extractor = extractor
        self.source = source
        self.metrics = dict(metrics)
        self.reference = reference
        self.batch_size = batch_size
        self.save_every = save_every
        self._references: dict[int, Reference] = {}
        self._baselines: dict[str, Value] | None = None

    @property
    def split(self) -> SplitName | None:
        """The split that is the reference; None if a file is."""
        return _SPLITS.get(self.reference)

    def check(self, total: int = 0) -> None:
        """Finds what would fail after hours of training: missing weights, images the extractor cannot take.

        Warns of fewer images than the features ask for.

        Arguments:
            total: the number of images that will be measured.

        Raises:
            DiffxError: with the remedy.
        """
        self.extractor.check(self.source.channels, self.source.image_size)
        if self.split is None:
            self._published().check(self.extractor)
        if total and self.extractor.dim:
            self.references(total).check()

    def references(self, total: int) -> Reference:
        """What `total` samples are compared with; its ingredients are computed at first need, and kept."""
        if total not in self._references:
            source = self.source
            self._references[total] = Reference(
                self.extractor,
                source.split(self.split) if self.split else None,
                total,
                training=source.split("train"),
                heldout=_optional(source, "test"),
                num_classes=source.num_classes,
                batch_size=self.batch_size,
                statistics=None if self.split else self._published(),
            )
        return self._references[total]

    def __call__(
        self,
        generator: Generator,
        total: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        *,
        on_batch: Callable[[int], None] | None = None,
        snapshot: Path | None = None,
        stop: Callable[[], int] | None = None,
    ) -> Measured:
        """Samples and measures; every rank samples and extracts, and sums are reduced.

        Arguments:
            generator: makes the samples 0 … total − 1.
            total: number of samples over all ranks.
            device: where to sample and extract.
            rank: this process.
            world_size: number of processes; all of them have to call it.
            on_batch: called with the number of samples done by all ranks after each batch.
            snapshot: where partial sums are kept; if they are there, the evaluation goes on from them, on any number
                of processes. It is left to the caller to delete it once the values are safe.
            stop: asked after each batch for the number of the signal that asks to stop, 0 for none; once any rank has
                one, the sums are saved and all ranks stop.

        Raises:
            Interrupted: if stopped.
            DiffxError: if samples are not finite.
        """
        clock = _Clock(torch.device(device))
        metrics, omitted = self._metrics(total, device)
        first = self._resume(metrics, snapshot, clock, rank) if snapshot else 0
        batches = generator.batches(total, self.batch_size, device, rank, world_size, first)
        per_round = self.batch_size * world_size
        saved = done = first
        made = 0
        clock.lap("rest")
        # a round is a batch on every rank: after it samples 0 … done − 1 are measured, whoever measured them
        for _ in range(math.ceil((total - first) / per_round)):
            batch = next(batches, None)
            clock.lap("sampling")
            if batch is not None:
                metrics.update(batch.images, batch.label if generator.num_classes else None, batch.index)
                made += len(batch.index)
            clock.lap("extraction")
            done = min(done + per_round, total)
            if on_batch is not None:
                on_batch(done)
            stopping = _of_any_rank(stop(), world_size, device) if stop is not None and done < total else 0
            if snapshot is not None and (stopping or (done - saved >= self.save_every and done < total)):
                _save(metrics, snapshot, done, clock.seconds, rank)
                saved = done
            if stopping:
                raise Interrupted(done, stopping)
            clock.lap("rest")
        values = metrics.compute()
        clock.lap("rest")
        return Measured(values, omitted, clock.seconds, metrics, made)

    def measure(self, images: Images) -> Measured:
        """Measures images instead of samples, all of them in their order."""
        clock = _Clock(self.extractor.device)
        total = len(images)
        metrics, omitted = self._metrics(total, self.extractor.device)
        labelled = self.source.num_classes > 0
        clock.lap("rest")
        for index in torch.arange(total).split(self.batch_size):
            batch = images.get(index)
            clock.lap("loading")
            metrics.update(batch["x"], batch["label"] if labelled else None, index)
            clock.lap("extraction")
        values = metrics.compute()
        clock.lap("rest")
        return Measured(values, omitted, clock.seconds, metrics)

    def baselines(self, rank: int = 0, world_size: int = 1) -> dict[str, Value]:
        """What a metric can be judged by: real images against the reference, and noise against it.

        The floor is what the other split reaches, at most 10,000 images of it: a model as good as the data would reach
        it with as many samples. Noise is uniform in every pixel. Computed once, whatever is evaluated after.

        Arguments:
            rank: this process.
            world_size: number of processes; all of them have to call it.

        Returns:
            `<metric>_floor` and `<metric>_noise` of the Fréchet distance; empty where it is not measured or the
            reference is a file.
        """
        make = self.metrics.get("fd")
        if make is None or self.split is None or not self.extractor.dim:
            return {}
        if self._baselines is None:
            other = _optional(self.source, "test" if self.split == "train" else "train")
            total = min(len(other), 10_000) if other is not None else 0
            shape = (self.source.channels, self.source.image_size, self.source.image_size)

            def noise() -> Iterator[Tensor]:
                for index in torch.arange(total).split(self.batch_size):
                    yield (Keys(0, index).uniform("noise-baseline", *shape) * 256).to(torch.uint8)

            def value(name: str, images: Iterable[Tensor]) -> Value:
                metrics = ImageMetrics(self.extractor, [make(self.references(total))]).to(self.extractor.device)
                first = 0
                for i, batch in enumerate(images):
                    if i % world_size == rank:
                        metrics.update(batch, None, torch.arange(first, first + len(batch)))
                    first += len(batch)
                (found,) = metrics.compute().values()
                return replace(found, name=f"{found.name}_{name}")

            found = (
                [value("floor", in_batches(other, self.batch_size, total)), value("noise", noise())]
                if other is not None
                else []
            )
            self._baselines = {v.name: v for v in found}
        return self._baselines

    def protocol(self) -> dict[str, Any]:
        """What the values depend on, as far as it is the evaluator's business."""
        if self.split is None:
            published = self._published()
            reference = {"file": Path(self.reference).name, "images": published.n, "fingerprint": self._file_hash()}
        else:
            images = self.source.split(self.split)
            reference = {
                "data": self.source.name,
                "split": self.reference,
                "images": len(images),
                "fingerprint": images.fingerprint(),
            }
        return {
            **self.extractor.protocol(),
            "quantization": "uint8, rounded to nearest",
            "reference": reference,
        }

    def _published(self) -> Statistics:
        file = Path(self.reference).expanduser()
        if not file.is_file():
            raise DiffxError(
                f"evaluation.reference={self.reference} is neither train or test, the splits, nor an .npz file with mu "
                "and sigma; correct it"
            )
        return Statistics.load(file)

    def _file_hash(self) -> str:
        return hashlib.sha256(Path(self.reference).expanduser().read_bytes()).hexdigest()[:32]

    def _metrics(self, total: int, device: torch.device | str) -> tuple[ImageMetrics, dict[str, str]]:
        self.extractor.to(device)
        reference, omitted = self.references(total), {}
        metrics: list[ImageMetric] = []
        for name, make in self.metrics.items():
            try:
                metrics.append(make(reference))
            except Inapplicable as reason:
                omitted[name] = str(reason)
        return ImageMetrics(self.extractor, metrics).to(device), omitted

    def _resume(self, metrics: ImageMetrics, snapshot: Path, clock: "_Clock", rank: int) -> int:
        """The number of samples that the snapshot holds; rank 0 takes their sums in."""
        if not snapshot.is_file():
            return 0
        try:
            with safe_open(snapshot, framework="pt") as file:
                said = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            done = int(said["done"])
            if rank == 0:
                metrics.load_state(state)
                clock.seconds.update(json.loads(said["seconds"]))
            return done
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
            warnings.warn(f"the evaluation starts anew, as '{snapshot}' cannot be used: {error}", stacklevel=3)
            metrics.reset()
            return 0


_SPLITS: dict[str, SplitName] = {"train": "train", "test": "test"}


def in_batches(images: Images, batch_size: int, total: int | None = None) -> Iterator[Tensor]:
    """The first `total` images of a split in order, uint8 `[b, C, H, W]` at a time."""
    count = len(images) if total is None else min(total, len(images))
    for indices in torch.arange(count).split(batch_size):
        yield images.get(indices)["x"]


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"sampling": 0.0, "extraction": 0.0, "rest": 0.0}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _save(metrics: ImageMetrics, snapshot: Path, done: int, seconds: dict[str, float], rank: int) -> None:
    state = metrics.state()  # all ranks together
    if rank:
        return
    try:
        with atomic_path(snapshot) as temporary:
            save_file(state, temporary, {"done": str(done), "seconds": json.dumps(seconds)})
    except DiffxError as error:  # a full disk costs the snapshot, not the evaluation
        warnings.warn(f"the evaluation goes on without a snapshot: {error}", stacklevel=3)


def _of_any_rank(number: int, world_size: int, device: torch.device | str) -> int:
    if world_size == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _optional(source: DataSource, split: SplitName) -> Images | None:
    """A split, or None where the data set has none."""
    try:
        return source.split(split)
    except DiffxError:
        return None
