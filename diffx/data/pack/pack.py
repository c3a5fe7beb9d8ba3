"""Packing: each shard is a function of the source, the settings and its number, whoever writes it and when."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch

from diffx.data.pack.manifest import Contents, Manifest, class_counts
from diffx.data.pack.processes import Stop, Tick, each
from diffx.data.pack.source import KeyNames, PackSource, checked_label, keys_of
from diffx.data.pack.transform import Stored, Transform
from diffx.data.pack.writer import Member, Staging
from diffx.data.shards.order import Windows
from diffx.utils import DiffxError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_PROBES = 64
_MIXED_BLOCKS = 16


class Interrupted(Exception):  # noqa: N818 (nothing has gone wrong)
    """Packing was asked to stop; finished shards are kept.

    Arguments:
        done: shards that are finished.
        total: shards that there will be.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"stopped with {done} of {total} shards finished; run the same command again to go on")


@dataclass(frozen=True)
class Layout:
    """How samples go into shards.

    Arguments:
        shard_size: samples in a shard, or about how many bytes, such as `256MB`.
        shuffle: whether samples are put into a random order once, so that no shard holds one class only.
        seed: the seed of that order.
        keys: `names` takes keys from the samples' names where they have some, `numbers` numbers them all.
        num_classes: the number of classes; None is as many as there are names, or labels.

    Raises:
        DiffxError: if the size is neither a number nor bytes.
    """

    shard_size: int | str = 10_000
    shuffle: bool = True
    seed: int = 0
    keys: KeyNames = "names"
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.keys not in ("names", "numbers"):
            raise DiffxError(f"keys={self.keys} is neither names nor numbers; choose one of them")
        _ = self.samples, self.bytes

    @property
    def samples(self) -> int | None:
        """Samples in a shard; None where the size is in bytes."""
        if isinstance(self.shard_size, str):
            return None
        if self.shard_size < 1:
            raise DiffxError(f"shard_size={self.shard_size} must be at least 1")
        return self.shard_size

    @property
    def bytes(self) -> int | None:
        """Bytes in a shard; None where the size is in samples."""
        if isinstance(self.shard_size, int):
            return None
        match = re.fullmatch(r"([\d.]+) *([kmg]?i?)b", self.shard_size.lower())
        if match is None or match[2] not in _UNITS or match[1].count(".") > 1 or float(match[1]) == 0:
            raise DiffxError(f"shard_size={self.shard_size} is neither samples, as 10000, nor bytes, as 256MB or 1GiB")
        return max(int(float(match[1]) * _UNITS[match[2]]), 1)


@dataclass(frozen=True)
class _Work:
    """What every process knows."""

    source: PackSource
    keys: list[str]
    order: np.ndarray
    per_shard: int
    transform: Transform
    num_classes: int | None
    skip: bool
    staging: Staging

    def shard(self, i: int, tick: Tick) -> None:
        """Writes shard i; `tick` is called after each sample, and may raise to stop."""
        contents = Contents()
        self.staging.write(i, self._members(i, contents, tick), contents)

    def _members(self, i: int, contents: Contents, tick: Tick) -> Iterator[Member]:
        for place in self.order[i * self.per_shard : (i + 1) * self.per_shard].tolist():
            key = self.keys[place]
            try:
                sample = self.source.read(place)
                stored = self.transform(sample)
            except DiffxError as error:
                if not self.skip:
                    raise DiffxError(f"{error}, or set broken=skip") from error
                contents.skipped[key] = str(error)
                tick()
                continue
            label = checked_label(sample, self.num_classes)
            yield f"{key}.{stored.extension}", stored.data
            if label is not None:
                yield f"{key}.cls", str(label).encode()
            for extension, data in sorted(sample.extras.items()):
                yield f"{key}.{extension}", data
            contents.count += 1
            contents.classes["" if label is None else str(label)] += 1
            contents.parts.update([stored.extension, *(["cls"] if label is not None else []), *sample.extras])
            contents.sizes[f"{stored.height}x{stored.width}"] += 1
            tick()


def pack(
    source: PackSource,
    dest: Path,
    transform: Transform,
    layout: Layout,
    *,
    broken: Literal["stop", "skip"] = "stop",
    workers: int = 1,
    on_sample: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Manifest:
    """Packs a source into a folder of tar shards, or goes on where an earlier call was interrupted.

    Arguments:
        source: what is packed.
        dest: the folder, new or empty, or begun by an earlier call with the same source and settings.
        transform: what is done to images.
        layout: how samples go into shards.
        broken: `stop` at the first image that cannot be read, or `skip` it and note it in the manifest.
        workers: processes; the bytes of the shards do not depend on it.
        on_sample: called now and then with the number of samples done and their total.
        stop: asked after each sample; once it is true, all processes stop.

    Returns:
        The manifest, which is in the folder too.

    Raises:
        Interrupted: if stopped.
        DiffxError: for bad samples, keys, labels, another plan's folder, or what cannot be written.
    """
    if not len(source):
        raise DiffxError(f"{source.where} has no samples; give a source with images")
    if layout.num_classes is not None and source.class_names and layout.num_classes != len(source.class_names):
        raise DiffxError(
            f"num_classes={layout.num_classes}, but {source.where} has {len(source.class_names)} classes; leave it out"
        )
    keys = keys_of(source, layout.keys)
    per_shard = layout.samples or _samples_for(layout.bytes or 1, source, transform)
    count = math.ceil(len(source) / per_shard)
    settings = {**asdict(transform), **asdict(layout), "samples_per_shard": per_shard}
    told = {"count": len(source), "identity": source.identity()}
    staging = Staging(dest, shard_names(count), {"samples": told, "settings": settings})
    if staging.begin():
        return Manifest.load(dest)
    num_classes = layout.num_classes or len(source.class_names) or None
    order = order_of(source, layout)
    work = _Work(source, keys, order, per_shard, transform, num_classes, broken == "skip", staging)
    with staging.lock():
        sizes = [min(per_shard, len(source) - i * per_shard) for i in range(count)]
        write_shards(work.shard, staging, sizes, workers, on_sample, stop)
        shards, contents = staging.totals()
        if not contents.count:
            first = next(iter(contents.skipped.values()))
            raise DiffxError(f"no sample of {source.where} can be read; the first: {first}")
        counts = class_counts(contents, num_classes)
        manifest = Manifest(
            contents.count,
            len(counts),
            source.class_names,
            counts,
            dict(sorted(contents.parts.items())),
            dict(contents.sizes.most_common()),
            settings,
            {"path": source.where.strip("'"), **told, "pillow": PIL.__version__},
            shards,
            dict(sorted(contents.skipped.items())),
            {},
        )
        staging.finish(manifest)
    return manifest


def shard_names(count: int) -> list[str]:
    """The file names of so many shards."""
    digits = max(6, len(str(count - 1)))
    return [f"{i:0{digits}d}.tar" for i in range(count)]


def write_shards(
    shard: Callable[[int, Tick], None],
    staging: Staging,
    sizes: Sequence[int],
    workers: int = 1,
    on_sample: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Writes all shards that are missing, in this process or in several, or this rank's share of them.

    Arguments:
        shard: writes the shard of a number; it calls its second argument after each sample.
        staging: knows which are missing.
        sizes: the number of samples of each shard.
        workers: processes.
        on_sample: called now and then with the number of samples done and their total.
        stop: asked now and then whether to stop.
        rank: shard i is written by rank i mod world_size.
        world_size: the number of ranks; they do not meet.

    Raises:
        Interrupted: if stopped.
        DiffxError: what `shard` raises, with how to go on.
    """
    mine = range(rank, len(sizes), world_size)
    missing = [i for i in staging.missing() if i in mine]
    total = sum(sizes[i] for i in mine)
    done = total - sum(sizes[i] for i in missing)
    report = on_sample or (lambda done, total: None)
    report(done, total)
    try:
        for _ in each(shard, missing, workers, lambda ticks: report(done + ticks, total), stop or (lambda: False)):
            pass
    except Stop:
        raise Interrupted(len(staging.names) - len(staging.missing()), len(staging.names)) from None
    except DiffxError as error:
        finished = len(staging.names) - len(staging.missing())
        raise DiffxError(
            f"{error}; {finished} of {len(staging.names)} shards are finished and kept: run the same command again to "
            "go on"
        ) from error


def order_of(source: PackSource, layout: Layout) -> np.ndarray:
    """Which sample stands at each place, int64 `[N]`."""
    if not layout.shuffle:
        return np.arange(len(source))
    blocks = source.blocks() or [len(source)]
    counts = torch.tensor(blocks)
    order = Windows(counts.cumsum(0) - counts, counts, _MIXED_BLOCKS, layout.seed, "pack")
    return order.rows(torch.arange(len(source))).numpy()


def _samples_for(size: int, source: PackSource, transform: Transform) -> int:
    """How many samples make a shard of about so many bytes, by those of some spread over the source."""
    sizes = []
    for i in range(min(_PROBES, len(source))):
        with suppress(DiffxError):  # what cannot be read is dealt with in its turn
            sample = source.read(i * len(source) // min(_PROBES, len(source)))
            stored: Stored = transform(sample)
            parts = [stored.data, *sample.extras.values(), *([b"0"] if sample.label is not None else [])]
            sizes.append(sum(512 + math.ceil(len(part) / 512) * 512 for part in parts))
    return max(1, round(size * len(sizes) / sum(sizes))) if sizes else 1
