"""Training data from WebDataset tar shards."""

import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from diffx.data.base import DataSource, SplitName
from diffx.data.loader import BLOCKS, StreamLoader
from diffx.data.shards.fields import conditions
from diffx.data.shards.images import ShardImages
from diffx.data.shards.order import Mixed, Order, Windows
from diffx.data.shards.patterns import expand, is_remote
from diffx.data.shards.reader import Decoding, ShardReader
from diffx.data.shards.remote import Copies
from diffx.data.shards.rows import Reading
from diffx.data.shards.stream import ShardStream
from diffx.data.shards.table import Member, Selection, Table, open_table
from diffx.data.stream import GlobalBatches
from diffx.utils import DiffxError, nearest

_BUCKET = re.compile(r"^(\d+)x(\d+)$")


class WebDataset(DataSource):
    """Tar shards in WebDataset's layout: `key.jpg`, `key.cls`, `key.txt`, `key.json` are the parts of one sample.

    Shards are read at any place, by an index of their headers that is made once. Sample n of the training is a function
    of (seed, n) and the shards, whatever the number of ranks, workers and restarts: pass e takes the shards in a random
    order, `shuffle_shards` at a time, and the samples of these in a random order, each once. Shards may be of any
    sizes, and fewer than ranks. Source: the layout is that of *High Performance I/O For Large Scale Deep Learning*
    (arXiv 2001.01858).

    Images are cropped, scaled and converted as data=folder does; of animations the first picture is taken. `key.npy`
    holds a decoded image, uint8 `[C, H, W]` of the very size, which is read as it is. Batches have `x`, `label` and
    `index`, and with `text` also `text`, uint8 `[b, text_bytes]`, the caption in UTF-8 with zeros behind it, and
    `text_length`, int64 `[b]`, its bytes, 0 where it is missing or dropped. With `buckets` all images of a step are of
    one of these sizes, whose turns come in proportion to the images that are nearest to it in proportions; what does
    not fill a batch goes into that bucket's next pass.

    An unreadable sample is replaced by the one behind it in its shard, counted in the log and named in a warning, or it
    is an error, as `on_error` says. What is held out is in `test_shards`, or chosen by the hash of the key.

    Remote shards (all that WebDataset's `gopen` opens) are copied to this machine before they are read; the shards of
    two windows have to fit into `cache_bytes`. Where the file `URL.index.npz` is missing beside one, `count_ahead`
    allows to fetch all of them at the start. Use it when the data are tar shards, or too many files for a folder.

    Arguments:
        shards: a path, folder, pattern (`x-{000..099}.tar`, `x-*.tar`) or URL, or a list of them.
        root: where relative paths start.
        test_shards: likewise, the shards that are held out; None to hold out `test_fraction`.
        test_fraction: the share of samples that is held out, in [0, 1).
        weights: how often each entry of `shards` is drawn from, in any unit; None to see every sample equally often.
        image: the part that is the image; by default the first of jpg, jpeg, png, webp … npy that a sample has.
        label: the part or `json.FIELD` that is the class; read if `num_classes` is above 0.
        text: the part or `json.FIELD` that is the caption, such as `txt`; None for none.
        text_bytes: the bytes that a caption may have; what is longer is cut off.
        caption_dropout: the share of captions that are left empty, chosen by the global sample number.
        filter: conditions such as `width>=256` or `punsafe<0.1` on fields of the `json`, all of which a sample meets;
            `width` and `height` are the image's where the `json` has none.
        buckets: sizes such as `320x192` (width and height); None for squares of `image_size`.
        random_crop: the smallest share of the shorter side that a random crop may have, such as 0.8; 1 moves the crop
            only; None crops at the centre.
        upscale: whether images smaller than `image_size` are enlarged; otherwise they are unreadable.
        shuffle_shards: how many shards are mixed at a time; 0 for all.
        on_error: `skip` replaces unreadable samples and does without what a truncated shard lacks, `raise` stops.
        max_skipped: the share of samples that may be replaced, in [0, 1].
        count_ahead: whether remote shards without an index are fetched at the start.
        cache_bytes: the most bytes of copies of remote shards on this machine.
        num_workers: as `DataSource`; None for as many as there are cores for each rank, at most 8.
        settings: as `DataSource`; `channels` is 1 or 3.

    Raises:
        DiffxError: if a setting is out of its range.
    """

    def __init__(
        self,
        *,
        shards: str | list[str],
        root: str = ".",
        test_shards: str | list[str] | None = None,
        test_fraction: float = 0.01,
        weights: list[float] | None = None,
        image: str | None = None,
        label: str = "cls",
        text: str | None = None,
        text_bytes: int = 512,
        caption_dropout: float = 0.0,
        filter: list[str] | str | None = None,
        buckets: list[str] | None = None,
        random_crop: float | None = None,
        upscale: bool = False,
        shuffle_shards: int = 64,
        on_error: Literal["skip", "raise"] = "skip",
        max_skipped: float = 0.01,
        count_ahead: bool = False,
        cache_bytes: int = 2**36,
        num_workers: int | None = None,
        **settings,
    ) -> None:
        super().__init__(num_workers=_default_workers() if num_workers is None else num_workers, **settings)
        if self.channels not in (1, 3):
            raise DiffxError(f"data.channels is {self.channels}; images in shards are read with data.channels=1 or 3")
        for key, value, fits, range_ in (
            ("test_fraction", test_fraction, 0 <= test_fraction < 1, "at least 0 and less than 1"),
            ("caption_dropout", caption_dropout, 0 <= caption_dropout <= 1, "between 0 and 1"),
            ("max_skipped", max_skipped, 0 <= max_skipped <= 1, "between 0 and 1"),
            ("random_crop", random_crop, random_crop is None or 0 < random_crop <= 1, "above 0 and at most 1"),
            ("shuffle_shards", shuffle_shards, shuffle_shards >= 0, "a whole number of at least 0"),
            ("text_bytes", text_bytes, text_bytes > 0, "a whole number above 0"),
        ):
            if not fits:
                raise DiffxError(f"data.{key} is {value}; set it to {range_}")
        if on_error not in ("skip", "raise"):
            raise DiffxError(f"data.on_error is '{on_error}'{nearest(on_error, ('skip', 'raise'))}; set skip or raise")
        if caption_dropout and text is None:
            raise DiffxError(f"data.caption_dropout={caption_dropout} needs captions; set data.text=txt")
        if weights is not None and (isinstance(shards, str) or len(weights) != len(shards)):
            raise DiffxError(
                f"data.weights has {len(weights)} numbers, and data.shards "
                f"{'is no list' if isinstance(shards, str) else f'{len(shards)} entries'}; give one for each entry"
            )
        self.shards = shards
        self.root = Path(root).expanduser()
        self.test_shards = test_shards
        self.weights = weights
        self.buckets = tuple(_bucket(text) for text in buckets or ())
        self.random_crop = random_crop
        self.shuffle_shards = shuffle_shards
        self.count_ahead = count_ahead
        self.caption_dropout = caption_dropout
        self.copies = Copies(cache_bytes)
        self.reading = Reading(
            self.channels,
            self.image_size,
            self.num_classes,
            image,
            label,
            text,
            conditions([filter] if isinstance(filter, str) else filter or ()),
            test_fraction if test_shards is None else 0.0,
            self.buckets,
            on_error == "raise",
        )
        self.decoding = Decoding(self.channels, upscale, text, text_bytes, on_error == "skip", max_skipped)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels as texts: shards hold no names."""
        return tuple(map(str, range(self.num_classes)))

    def prepare(self) -> None:
        """Makes the indexes that are missing, and with `count_ahead` fetches remote shards for that."""
        _ = self._table

    def check(self) -> None:
        """Looks whether the shards are there, and whether the first image can be read; see `DataSource.check`."""
        images, table = self.split("train"), self._table
        if self.buckets and table.columns["raw"].any():
            raise DiffxError("npy parts have one size, so that they take no data.buckets; set data.buckets=null")
        self.order(0)
        remote = [
            size for m, (size, _) in zip(table.members, table.identities.tolist(), strict=True) if is_remote(m.name)
        ]
        need = sum(sorted(remote, reverse=True)[: 2 * self.shuffle_shards or None])
        if need > self.copies.limit:
            raise DiffxError(
                f"two windows of {self.shuffle_shards or len(remote)} remote shards take up to {need:,} bytes, and "
                f"data.cache_bytes is {self.copies.limit:,}; raise it, or lower data.shuffle_shards"
            )
        if not remote:
            images.get(torch.tensor([0]))

    def split(self, name: SplitName) -> ShardImages:
        """The images of one split; see `DataSource.split`."""
        if name not in ("train", "test"):
            raise DiffxError(f"no split is called '{name}'{nearest(name, ('train', 'test'))}; use train or test")
        last = self.reading.groups - 1
        group = last if name == "test" else slice(0, last)
        reader = self._reader(self._table.group(group))
        if not len(reader.selection):
            why = "".join(f", {n:,} {reason}" for reason, n in self._table.left_out.items())
            raise DiffxError(
                f"the {name} split of data={self.name} has no images{why}; set data.test_shards, data.test_fraction or "
                "data.filter"
            )
        return ShardImages(reader, (self.image_size, self.image_size))

    def train_loader(
        self,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pin_memory: bool = False,
    ) -> StreamLoader:
        """The endless training stream of one rank; see `DataSource.train_loader`."""
        batches = GlobalBatches(self.batch_size, start_step, rank, world_size, accumulate)
        order, sizes = self.order(seed)
        self._check_shared_memory(self.batch_size // (world_size * accumulate))
        stream = ShardStream(
            self._reader(self._table.group(slice(0, self.reading.groups - 1))),
            order,
            seed,
            (self.image_size, self.image_size),
            buckets=sizes,
            flip=self.flip,
            random_crop=self.random_crop,
            caption_dropout=self.caption_dropout,
        )
        return StreamLoader(stream, batches, self.num_workers, pin_memory)

    def order(self, seed: int) -> tuple[Order, list[tuple[int, int]]]:
        """Which row of the table is sample n, and the sizes of the buckets that it chooses from for each step.

        Raises:
            DiffxError: if there are no images, or an entry of `shards` has none to draw.
        """
        table, sources = self._table, range(len(self.weights)) if self.weights else [None]
        totals = [len(table.group(slice(0, self.reading.groups - 1), source)) for source in sources]
        for source, total in zip(sources, totals, strict=True):
            if not total:
                entry = self.shards if source is None else self.shards[source]
                raise DiffxError(f"no image of data.shards={entry} is for training; correct it, or data.filter")
        orders, weights, sizes = [], [], []
        for bucket in range(self.reading.groups - 1):
            selections = [table.group(bucket, source) for source in sources]
            shares = [
                weight * len(selection) / total
                for weight, selection, total in zip(self.weights or [1.0], selections, totals, strict=True)
            ]
            windows = [
                Windows(s.firsts, s.counts, self.shuffle_shards, seed, f"/{k}/{bucket}" if k or bucket else "")
                for k, s in enumerate(selections)
                if len(s)
            ]
            shares = [share for share, selection in zip(shares, selections, strict=True) if len(selection)]
            if windows:
                orders.append(windows[0] if len(windows) == 1 else Mixed(windows, shares, seed, f"mixture/{bucket}"))
                weights.append(sum(shares))
                sizes += self.buckets[bucket : bucket + 1]
        if not self.buckets:
            return orders[0], []
        # the rarest bucket has its turn now and then
        least = 2 * sum(weights) / 65536
        return Mixed(orders, [max(weight, least) for weight in weights], seed, "bucket", self.batch_size), sizes

    def describe(self) -> str:
        """One line, "webdataset: 128,116 train and 5,000 test images of 3×64×64 pixels, 10 classes, in 146 shards"."""
        last, table = self.reading.groups - 1, self._table
        train, test = len(table.group(slice(0, last))), len(table.group(last))
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        sizes = ", ".join(f"{w}×{h}" for h, w in self.buckets) or f"{self.image_size}×{self.image_size}"
        left_out = "".join(f", {n:,} {reason}" for reason, n in table.left_out.items())
        return (
            f"{self.name}: {train:,} train and {test:,} test images of {self.channels}×{sizes} pixels, {classes}, in "
            f"{len(table.members):,} shards{f' (left out: {left_out[2:]})' if left_out else ''}"
        )

    @cached_property
    def _table(self) -> Table:
        entries = [self.shards] if isinstance(self.shards, str) or not self.weights else self.shards
        found = [Member(name, source) for source, entry in enumerate(entries) for name in expand(entry, self.root)]
        if self.test_shards is not None:
            held_out = expand(self.test_shards, self.root, "data.test_shards")
            # a pattern for all and one for some of them is the simplest thing to type
            found = [member for member in found if member.name not in set(held_out)]
            found += [Member(name, held_out=True) for name in held_out]
        names = [member.name for member in found]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise DiffxError(f"data.shards has the shard '{twice}' in two entries; name it in one of them")
        return open_table(found, self.reading, self.copies, self.count_ahead)

    def _reader(self, selection: Selection) -> ShardReader:
        return ShardReader(self._table, selection, self.decoding, self.copies)

    def _check_shared_memory(self, batch_size: int) -> None:
        """Refuses before training what a full /dev/shm would end in the midst of it."""
        largest = max((h * w for h, w in self.buckets), default=self.image_size**2)
        need = self.num_workers * BLOCKS * batch_size * (self.channels * largest + self.decoding.text_bytes)
        folder = Path("/dev/shm")
        if folder.is_dir() and need > shutil.disk_usage(folder).free:
            free = shutil.disk_usage(folder).free
            raise DiffxError(
                f"{self.num_workers} workers need {need >> 20:,} MiB of shared memory and {free >> 20:,} are free in "
                "/dev/shm; lower data.num_workers, or enlarge it (docker run --shm-size=…)"
            )


def _bucket(text: str) -> tuple[int, int]:
    match = _BUCKET.match(text)
    if match is None or "0" in match.groups():
        raise DiffxError(f"data.buckets has '{text}'; write WIDTHxHEIGHT, such as 320x192")
    return int(match.group(2)), int(match.group(1))


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = os.environ.get("LOCAL_WORLD_SIZE") or (os.environ.get("WORLD_SIZE") if "LOCAL_RANK" in os.environ else None)
    return max(1, min(8, cores // int(here or 1)))
