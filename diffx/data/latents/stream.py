"""The training stream of latents: sample n is a function of (seed, n) and the shards."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from diffx.data.base import Batch
from diffx.data.loader import new_batch
from diffx.data.shards.files import OpenShards
from diffx.data.shards.index import ShardIndex
from diffx.data.shards.order import Windows
from diffx.data.shards.remote import Copies
from diffx.data.shards.table import Table
from diffx.utils import DiffxError, Keys

MOMENTS, MIRRORED = "npy", "flip.npy"
"""The parts of a sample: the moments of its latent, and those of its mirror image."""


class LatentStream(Dataset[Batch]):
    """The endless sequence of training latents.

    Arguments:
        table: where they are: offsets of the numbers by part, and labels.
        order: which row is sample n.
        seed: keys the choice between an image and its mirror image.
        shape: the shape of the moments, (2c, h, w).
        dtype: their type, `float16` or `float32`.
        flip: whether half of the samples are latents of mirrored images.
    """

    def __init__(
        self, table: Table, order: Windows, seed: int, shape: tuple[int, int, int], dtype: str, flip: bool
    ) -> None:
        self.table = table
        self.order = order
        self.seed = seed
        self.shape = shape
        self.dtype = {"float16": torch.float16, "float32": torch.float32}[dtype]
        self.flip = flip
        self.files = OpenShards(table, Copies(0))

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """A batch of samples.

        Arguments:
            samples: b ascending global sample numbers.

        Returns:
            `moments` float `[b, 2c, h, w]`, `label` int64 `[b]`, `index` int64 `[b]`.

        Raises:
            DiffxError: if a shard is missing, has changed or cannot be read.
        """
        index = torch.as_tensor(list(samples), dtype=torch.int64)
        n, columns = len(index), self.table.columns
        batch = new_batch(
            {"moments": (self.dtype, (n, *self.shape)), "label": (torch.int64, (n,)), "index": (torch.int64, (n,))}
        )
        rows = self.order.rows(index)
        offset = columns[MOMENTS][rows]
        if self.flip:
            offset = torch.where(Keys(self.seed, index).uniform("flip") < 0.5, columns[MIRRORED][rows], offset)
        numbers = batch["moments"].numpy()
        for k, (shard, start) in enumerate(zip(self.table.shard_of(rows).tolist(), offset.tolist(), strict=True)):
            self._into(numbers[k], shard, start)
        batch["label"].copy_(columns["label"][rows])
        batch["index"].copy_(index)
        return batch

    def _into(self, numbers: np.ndarray, shard: int, start: int) -> None:
        name = self.table.members[shard].name
        try:
            read = os.preadv(self.files.get(shard), (numbers,), start)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise DiffxError(f"the shard '{name}' cannot be read ({error.strerror}); check the storage") from error
        if read != numbers.nbytes:
            raise DiffxError(f"the shard '{name}' is cut off; encode or copy it again")


def places(index: ShardIndex, part: str, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Where the numbers of each array of a part begin, behind their equal headers, int64 `[n]`.

    Arguments:
        index: of the shard.
        part: which arrays.
        shape: their shape.
        dtype: their type.

    Raises:
        DiffxError: if one is missing or another.
    """
    offset, size = index.part(part)
    with Path(index.path).open("rb") as file:
        head = os.pread(file.fileno(), 256, int(offset[0])) if offset[0] >= 0 else b""
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        found = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DiffxError(f"'{index.path}' has no arrays as its parts {part} ({error}); encode it again") from error
    length = stream.tell() + math.prod(shape) * dtype.itemsize
    if found != (shape, False, dtype) or (size != length).any():
        raise DiffxError(
            f"the parts {part} of '{index.path}' are not all {dtype} {list(shape)}, as the manifest says; encode it "
            "again"
        )
    return offset + stream.tell()


def labels(index: ShardIndex, num_classes: int) -> np.ndarray:
    """The class of each sample, int64 `[n]`; 0 where classes are not read."""
    if not num_classes:
        return np.zeros(len(index), np.int64)
    if index.labels is None or index.labels.min() < 0 or index.labels.max() >= num_classes:
        raise DiffxError(
            f"'{index.path}' has samples without a class of 0..{num_classes - 1}; set data.num_classes, or 0 to train "
            "without classes"
        )
    return index.labels.astype(np.int64)
