"""What training needs to know of each sample of a shard, from its index and as little of its content as possible."""

import hashlib
import io
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffx.data.decode import SUFFIXES, image_shape
from diffx.data.shards.fields import SIZES, Condition, as_label, field_of, look_up, parse_json
from diffx.data.shards.index import ShardIndex
from diffx.utils import DiffxError, nearest

IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    *(s[1:] for s in SUFFIXES if s not in (".jpg", ".jpeg", ".png", ".webp")),
    "npy",
)
"""The parts that are taken for the image, the first that a sample has."""


@dataclass(frozen=True)
class Reading:
    """Which samples count, and what is read of each.

    Arguments:
        channels: 1 for grey, 3 for RGB.
        image_size: height and width; arrays of `npy` parts have this size already.
        num_classes: labels are below it; 0 reads no labels.
        image: the part that is the image; by default the first of `IMAGES` that a sample has.
        label: the part or `json.FIELD` that is the class.
        text: the part or `json.FIELD` that is the caption; None for none.
        conditions: samples that do not meet all of them are left out.
        test_fraction: the share held out, in [0, 1), by the hash of the key.
        buckets: heights and widths; each sample goes to that of the nearest proportions.
        whole: whether a shard whose end is missing is an error; otherwise the samples that are left count.
    """

    channels: int
    image_size: int
    num_classes: int
    image: str | None
    label: str
    text: str | None
    conditions: tuple[Condition, ...]
    test_fraction: float
    buckets: tuple[tuple[int, int], ...]
    whole: bool

    @property
    def groups(self) -> int:
        """The number of groups of samples: one for each bucket (or one), and the held-out ones."""
        return max(len(self.buckets), 1) + 1

    @cached_property
    def reads_sizes(self) -> bool:
        """Whether heights and widths of images matter."""
        return bool(self.buckets) or any(condition.field in SIZES for condition in self.conditions)

    @cached_property
    def reads_json(self) -> bool:
        """Whether the `json` of each sample has to be read."""
        return bool(self.conditions) or self.reads_sizes or (self.num_classes > 0 and field_of(self.label) is not None)


@dataclass
class Rows:
    """The samples of one shard that count, those of each group together.

    Arguments:
        columns: arrays of one length: `row` (the number in the index), `offset`, `size`, `raw` (whether the image is an
            array whose bytes start there), `label`, and `text_offset`, `text_size` where there are captions.
        sizes: how many rows each group has, int64 `[G]`.
        left_out: why samples do not count, and how many.
    """

    columns: dict[str, np.ndarray]
    sizes: np.ndarray
    left_out: dict[str, int]


def rows_of(index: ShardIndex, file: Callable[[], Path], reading: Reading, held_out: bool) -> Rows:
    """Chooses and describes the samples of a shard.

    Arguments:
        index: of the shard.
        file: says where the shard can be read; called only if that is needed.
        reading: what counts.
        held_out: whether all samples are held out, whatever `test_fraction` says.

    Raises:
        DiffxError: if the shard is not whole and has to be, no sample has an image, a label is missing, no number or
            out of range, an array has another type or shape, or a field of a condition is in no sample.
    """
    with closing(_Shard(index, file)) as shard:
        return _rows(shard, reading, held_out)


def _rows(shard: "_Shard", reading: Reading, held_out: bool) -> Rows:
    index = shard.index
    offset, size, raw = _images(index, reading.image)
    left_out: Counter[str] = Counter()
    if not index.complete:
        message = f"the end of '{index.path}' is missing; fetch or write it anew"
        if reading.whole:
            raise DiffxError(f"{message}, or set data.on_error=skip to train on what is left of it")
        warnings.warn(f"{message}: the samples that are left of it are used", stacklevel=2)
        left_out["cut off"] += 1
    kept = offset >= 0
    left_out["without image"] += int((~kept).sum())
    documents = _documents(shard, np.flatnonzero(kept), reading) if reading.reads_json else {}
    shapes = _shapes(shard, documents, offset, size, raw) if reading.reads_sizes else {}
    if reading.conditions:
        met = _met(shard, documents, shapes, reading.conditions)
        left_out["filtered"] += int(kept.sum()) - len(met)
        kept = np.zeros(len(index), bool)
        kept[met] = True
    chosen = np.flatnonzero(kept)
    group = _groups(index, chosen, shapes, reading, held_out)
    chosen = chosen[np.argsort(group, kind="stable")]
    columns = {"row": chosen.astype(np.int32), "offset": offset[chosen], "size": size[chosen].astype(np.int32)}
    columns["raw"] = raw[chosen]
    _skip_headers(shard, columns, reading)
    columns["label"] = _labels(shard, chosen, documents, reading)
    if reading.text is not None:
        text_offset, text_size = index.part("json" if field_of(reading.text) else reading.text)
        columns |= {"text_offset": text_offset[chosen], "text_size": text_size[chosen].astype(np.int32)}
    sizes = np.bincount(group, minlength=reading.groups).astype(np.int64)
    return Rows(columns, sizes, {reason: n for reason, n in left_out.items() if n})


class _Shard:
    """A shard to read small parts from."""

    def __init__(self, index: ShardIndex, file: Callable[[], Path]) -> None:
        self.index = index
        self.file = file
        self._stream: IO[bytes] | None = None

    def name(self, i: int, extension: str) -> str:
        """What messages call a part."""
        return f"{self.index.path}/{self.index.key(i)}.{extension}"

    def read(self, offset: Any, size: Any) -> bytes:
        """Some bytes."""
        if self._stream is None:
            self._stream = self.file().open("rb", buffering=0)
        return os.pread(self._stream.fileno(), int(size), int(offset))

    def close(self) -> None:
        """Ends reading."""
        if self._stream is not None:
            self._stream.close()


def _images(index: ShardIndex, image: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the image of each sample is, offset -1 for none, and whether it is an array."""
    offset, size, raw = np.full(len(index), -1, np.int64), np.zeros(len(index), np.int64), np.zeros(len(index), bool)
    for extension in (image,) if image else IMAGES:
        there, bytes_ = index.part(extension)
        new = (offset < 0) & (there >= 0)
        offset[new], size[new], raw[new] = there[new], bytes_[new], extension.rpartition(".")[2] == "npy"
    if len(index) and (offset < 0).all():
        raise DiffxError(
            f"'{index.path}' has no part {image or ' or '.join(('jpg', 'png', 'webp', 'npy'))}, its samples have "
            f"{', '.join(index.extensions)}; set data.image to the one that is the image"
        )
    if size.max(initial=0) >= 2**31:
        raise DiffxError(f"'{index.path}' holds an image of {size.max():,} bytes; remove it")
    return offset, size, raw


def _documents(shard: _Shard, chosen: np.ndarray, reading: Reading) -> dict[int, Any]:
    """The `json` of samples by their number; None where there is none."""
    offset, size = shard.index.part("json")
    return {
        i: parse_json(shard.read(offset[i], size[i]), shard.name(i, "json")) if offset[i] >= 0 else None
        for i in chosen.tolist()
    }


def _shapes(
    shard: _Shard, documents: dict[int, Any], offset: np.ndarray, size: np.ndarray, raw: np.ndarray
) -> dict[int, tuple[int, int]]:
    """Heights and widths, from the `json` where it has them, otherwise from the image; (0, 0) if it has none."""
    shapes = {}
    for i, document in documents.items():
        height, width = look_up(document, "height"), look_up(document, "width")
        if not (isinstance(height, int) and isinstance(width, int)):
            data = shard.read(offset[i], size[i])
            try:
                height, width = image_shape(data, "") if not raw[i] else (0, 0)
            except DiffxError:  # how corrupt images are dealt with is decided where they are read
                height, width = 0, 0
        shapes[i] = (height, width)
    return shapes


def _met(
    shard: _Shard, documents: dict[int, Any], shapes: dict[int, tuple[int, int]], conditions: Sequence[Condition]
) -> list[int]:
    """The samples that meet all conditions."""
    met = list(documents)
    for condition in conditions:
        values = {i: look_up(documents[i], condition.field) for i in documents}
        if condition.field in SIZES:
            values = {i: shapes[i][condition.field == "width"] for i in documents}
        if values and all(value is None for value in values.values()):
            known = {field for document in documents.values() if isinstance(document, dict) for field in document}
            raise DiffxError(
                f"no sample of '{shard.index.path}' has the json field '{condition.field}' of data.filter"
                f"{nearest(condition.field, known)}; its fields are {', '.join(sorted(known)) or 'none'}"
            )
        met = [i for i in met if condition.holds(values[i])]
    return met


def _groups(
    index: ShardIndex, chosen: np.ndarray, shapes: dict[int, tuple[int, int]], reading: Reading, held_out: bool
) -> np.ndarray:
    """The group of each sample: its bucket, or the last one if it is held out."""
    last = reading.groups - 1
    if held_out:
        return np.full(len(chosen), last)
    group = np.zeros(len(chosen), np.int64)
    if reading.buckets:
        proportions = np.log([width / height for height, width in reading.buckets])
        own = np.log([width / height if height and width else 1.0 for height, width in (shapes[i] for i in chosen)])
        group = np.abs(own[:, None] - proportions).argmin(1) if len(chosen) else group
    if reading.test_fraction:
        keys = index.keys()
        bound = math.ceil(reading.test_fraction * 2**64)
        group[[_number(keys[i]) < bound for i in chosen.tolist()]] = last
    return group


def _number(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _labels(shard: _Shard, chosen: np.ndarray, documents: dict[int, Any], reading: Reading) -> np.ndarray:
    if not reading.num_classes:
        return np.zeros(len(chosen), np.int32)
    if reading.label == "cls" and shard.index.labels is not None:
        labels = shard.index.labels[chosen]
    else:
        labels = np.array([_label(shard, i, documents, reading) for i in chosen.tolist()], np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= reading.num_classes))
    if len(wrong):
        label = int(labels[wrong[0]])
        remedy = f"set data.num_classes={labels.max() + 1} or more, or " if label >= 0 else ""
        name = shard.name(int(chosen[wrong[0]]), "json" if field_of(reading.label) else reading.label)
        raise DiffxError(
            f"the label of '{name}' is {label}, and labels are 0 to {reading.num_classes - 1}; {remedy}write the shard "
            "anew"
        )
    return labels.astype(np.int32)


def _label(shard: _Shard, i: int, documents: dict[int, Any], reading: Reading) -> int:
    field = field_of(reading.label)
    offset, size = shard.index.part(reading.label)
    value = look_up(documents[i], field) if field else None
    if field is None and offset[i] >= 0:
        value = shard.read(offset[i], size[i])
    if value is None:
        raise DiffxError(
            f"the sample '{shard.index.key(i)}' of '{shard.index.path}' has no {reading.label}; set data.label to what "
            f"has its class (it has {', '.join(shard.index.extensions)}), or data.num_classes=0"
        )
    return as_label(value, shard.name(i, "json" if field else reading.label))


def _skip_headers(shard: _Shard, columns: dict[str, np.ndarray], reading: Reading) -> None:
    """Makes the images that are arrays start at their pixels."""
    shape = (reading.channels, reading.image_size, reading.image_size)
    heads: dict[tuple[bytes, int], int] = {}
    for k in np.flatnonzero(columns["raw"]).tolist():
        size = int(columns["size"][k])
        head = shard.read(columns["offset"][k], min(size, 128))
        if (head, size) not in heads:
            heads[head, size] = _header_length(head, size, shape, shard.name(int(columns["row"][k]), "npy"))
        columns["offset"][k] += heads[head, size]
        columns["size"][k] = math.prod(shape)


def _header_length(head: bytes, size: int, shape: tuple[int, ...], name: str) -> int:
    """How many bytes of an array's part come before its pixels."""
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        found, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DiffxError(f"'{name}' is no array of NumPy's format 1.0 ({error}); write the shard anew") from error
    if found != shape or dtype != np.uint8 or fortran or size != stream.tell() + math.prod(shape):
        raise DiffxError(
            f"'{name}' holds {dtype} {list(found)}, and images are uint8 {list(shape)}; set data.channels and "
            "data.image_size to what it has, or data.image to another part"
        )
    return stream.tell()
