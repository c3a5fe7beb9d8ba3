"""From rows of a table to batches."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffx.data.base import Batch
from diffx.data.decode import Crop, decode_into, reverse_rows
from diffx.data.loader import Layout, new_batch
from diffx.data.shards.fields import field_of, look_up, parse_json
from diffx.data.shards.files import OpenShards
from diffx.data.shards.index import load_index
from diffx.data.shards.patterns import is_remote
from diffx.data.shards.remote import Copies
from diffx.data.shards.table import Selection, Table
from diffx.utils import DiffxError

_TRIES = 64
_AT_LEAST = 1000


@dataclass(frozen=True)
class Decoding:
    """How the bytes of a sample become tensors.

    Arguments:
        channels: 1 for grey, 3 for RGB.
        upscale: whether smaller images are enlarged, instead of taken for unreadable.
        text: the part or `json.FIELD` that is the caption; None for none.
        text_bytes: the length L of the captions' tensor; longer captions are cut off between two characters.
        skip: whether an unreadable sample is replaced, instead of being an error.
        most_replaced: the share of a process's samples that may be replaced.
    """

    channels: int
    upscale: bool
    text: str | None
    text_bytes: int
    skip: bool
    most_replaced: float


class ShardReader:
    """Rows of a table as tensors; an unreadable one is replaced by the next readable one of its selection.

    Arguments:
        table: the rows.
        selection: those that may be asked for.
        decoding: what is done with their bytes.
        copies: of remote shards.
    """

    def __init__(self, table: Table, selection: Selection, decoding: Decoding, copies: Copies) -> None:
        self.table = table
        self.selection = selection
        self.decoding = decoding
        self.files = OpenShards(table, copies)
        self.asked = 0
        self.replaced = 0

    def read(
        self, rows: Tensor, size: tuple[int, int], crops: Sequence[Crop] | None = None, mirrored: Tensor | None = None
    ) -> Batch:
        """A batch.

        Arguments:
            rows: rows of the selection, int64 `[b]`.
            size: height and width of the images.
            crops: what to take of each image; its centre by default.
            mirrored: which images are mirrored left to right, bool `[b]`; none by default.

        Returns:
            `x` uint8 `[b, C, H, W]` (where files are decoded, with the colours of a pixel side by side in memory, as
            decoders have them), `label` int64 `[b]`, `index` int64 `[b]`, to be filled by the caller, `replaced` bool
            `[b]`, where any sample was, and, where there are captions, `text` uint8 `[b, L]` (UTF-8, zeros behind it)
            and `text_length` int64 `[b]`.

        Raises:
            DiffxError: if a sample is unreadable and may not be replaced, too many are, or a shard is missing.
        """
        batch = self._new_batch(len(rows), size)
        self.asked += len(rows)
        if self.table.raw:
            failed = self._read_arrays(batch["x"], rows, mirrored)
        else:
            failed = self._read_files(batch["x"], rows, size, crops, mirrored)
        if self.decoding.text is not None:
            failed |= self._read_texts(batch, rows)
        final = rows
        if failed:
            final = rows.clone()
            batch["replaced"] = torch.zeros(len(rows), dtype=torch.bool)
            batch["replaced"][list(failed)] = True
        for k, error in failed.items():
            crop, mirror = crops and crops[k : k + 1], None if mirrored is None else mirrored[k : k + 1]
            final[k] = self._replace(batch, k, int(rows[k]), error, size, crop, mirror)
        batch["label"].copy_(self.table.columns["label"][final])
        return batch

    def _new_batch(self, n: int, size: tuple[int, int]) -> Batch:
        channels, raw = self.decoding.channels, self.table.raw
        layout: Layout = {
            "x": (torch.uint8, (n, channels, *size) if raw else (n, *size, channels)),
            "label": (torch.int64, (n,)),
            "index": (torch.int64, (n,)),
        }
        if self.decoding.text is not None:
            layout |= {"text": (torch.uint8, (n, self.decoding.text_bytes)), "text_length": (torch.int64, (n,))}
        batch = new_batch(layout)
        if not raw:
            batch["x"] = batch["x"].permute(0, 3, 1, 2)
        return batch

    # ---- the parts of a batch: each returns what is wrong with which sample ----

    def _read_files(
        self,
        x: Tensor,
        rows: Tensor,
        size: tuple[int, int],
        crops: Sequence[Crop] | None,
        mirrored: Tensor | None,
    ) -> dict[int, DiffxError]:
        pixels, columns, failed = x.permute(0, 2, 3, 1).numpy(), self.table.columns, {}
        flips = mirrored.tolist() if mirrored is not None else [False] * len(rows)
        places = self._places(rows, columns["offset"], columns["size"])
        raw = columns["raw"][rows].tolist() if columns["raw"].any() else [False] * len(rows)
        for k, (row, shard, offset, length) in enumerate(places):
            file = self.files.get(shard)
            try:
                data = self._bytes(file, offset, length, row)
                if raw[k]:
                    image = np.frombuffer(data, np.uint8).reshape(x.shape[1:]).transpose(1, 2, 0)
                    pixels[k] = image[:, ::-1] if flips[k] else image
                else:
                    crop = crops[k] if crops is not None else None
                    decode_into(pixels[k], data, _Name(self, row), self.decoding.upscale, crop, flips[k])
            except DiffxError as error:
                failed[k] = error
        return failed

    def _read_arrays(self, x: Tensor, rows: Tensor, mirrored: Tensor | None) -> dict[int, DiffxError]:
        pixels = x.numpy()
        length = pixels[0].size
        shards, starts = self.table.shard_of(rows).tolist(), self.table.columns["offset"][rows].tolist()
        maps = {shard: self.files.map(shard) for shard in set(shards)}
        # one call copies all images: with one for each, reading would take several times as long
        together = b"".join([maps[shard][start : start + length] for shard, start in zip(shards, starts, strict=True)])
        pixels.reshape(-1)[:] = np.frombuffer(together, np.uint8)
        if mirrored is not None:
            chosen = mirrored.numpy()
            plain = pixels[chosen]
            turned = np.empty_like(plain)
            reverse_rows(plain, turned)
            pixels[chosen] = turned
        return {}

    def _read_texts(self, batch: Batch, rows: Tensor) -> dict[int, DiffxError]:
        assert self.decoding.text is not None
        field, columns, failed = field_of(self.decoding.text), self.table.columns, {}
        batch["text"].zero_()
        texts, lengths = batch["text"].numpy(), batch["text_length"].zero_().numpy()
        for k, (row, shard, offset, length) in enumerate(
            self._places(rows, columns["text_offset"], columns["text_size"])
        ):
            if offset < 0:
                continue
            file = self.files.get(shard)
            try:
                data = self._bytes(file, offset, length, row)
                if field is not None:
                    value = look_up(parse_json(data, f"{self.name(row)}.json"), field)
                    data = value.encode() if isinstance(value, str) else b""
            except DiffxError as error:
                failed[k] = error
                continue
            data = _shortened(data, texts.shape[1])
            lengths[k] = len(data)
            texts[k, : len(data)] = memoryview(data)
        return failed

    def _places(self, rows: Tensor, offset: Tensor, size: Tensor) -> Any:
        """Row, shard, offset and size of each."""
        return zip(
            rows.tolist(), self.table.shard_of(rows).tolist(), offset[rows].tolist(), size[rows].tolist(), strict=True
        )

    def _bytes(self, file: int, offset: int, length: int, row: int) -> bytes:
        try:
            data = os.pread(file, length, offset)
        except OSError as error:
            raise DiffxError(f"'{self.name(row)}' cannot be read ({error.strerror}); check the storage") from error
        if len(data) != length:
            raise DiffxError(f"'{self.name(row)}' is cut off; write the shard anew")
        return data

    # ---- what cannot be read ----

    def _replace(
        self,
        batch: Batch,
        k: int,
        row: int,
        error: DiffxError,
        size: tuple[int, int],
        crop: Sequence[Crop] | None,
        mirror: Tensor | None,
    ) -> int:
        """Puts another sample into a batch, the same on every machine, and returns its row."""
        if not self.decoding.skip:
            raise DiffxError(f"{error}; or set data.on_error=skip to replace such samples") from error
        self.replaced += 1
        most = self.decoding.most_replaced * max(self.asked, _AT_LEAST)
        if self.replaced > most:
            raise DiffxError(
                f"{self.replaced} of the {self.asked} samples that this process has read had to be replaced, more than "
                f"data.max_skipped={self.decoding.most_replaced}; the last was: {error}"
            ) from error
        warnings.warn(f"sample replaced: {error}", stacklevel=2)
        one = {name: value[k : k + 1] for name, value in batch.items()}
        for _ in range(_TRIES):
            row = self.selection.after(row, int(self.table.shard_of(torch.tensor([row]))))
            rows = torch.tensor([row])
            read = (
                self._read_arrays(one["x"], rows, mirror)
                if self.table.raw
                else self._read_files(one["x"], rows, size, crop, mirror)
            )
            if not read and (self.decoding.text is None or not self._read_texts(one, rows)):
                return row
        raise DiffxError(
            f"{_TRIES} samples in a row cannot be read, the first of them: {error}; check the shard"
        ) from error

    def name(self, row: int) -> str:
        """Shard and key of a row, for messages."""
        member = self.table.members[int(self.table.shard_of(torch.tensor([row])))].name
        i = int(self.table.columns["row"][row])
        try:
            index = self.files.copies.index(member, False) if is_remote(member) else load_index(member)
        except DiffxError:
            index = None
        return f"{member}/{index.key(i)}" if index is not None else f"{member}, sample {i}"


class _Name:
    """The name of a row, found only if it is printed."""

    def __init__(self, reader: ShardReader, row: int) -> None:
        self.reader = reader
        self.row = row

    def __str__(self) -> str:
        return self.reader.name(self.row)


def _shortened(data: bytes, length: int) -> bytes:
    """The beginning of a text in UTF-8, without half a character at its end."""
    return data if len(data) <= length else data[:length].decode("utf-8", "ignore").encode()
