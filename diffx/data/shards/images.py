"""A split that lies in shards."""

import hashlib
import json

import torch
from torch import Tensor

from diffx.data.base import Batch, Images
from diffx.data.shards.reader import ShardReader


class ShardImages(Images):
    """The images of a selection of rows, cropped at their centres.

    Arguments:
        reader: reads the rows.
        size: height and width of the images.
    """

    def __init__(self, reader: ShardReader, size: tuple[int, int]) -> None:
        self.reader = reader
        self.size = size

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def __len__(self) -> int:
        return len(self.reader.selection)

    def get(self, indices: Tensor) -> Batch:
        """Images by position; see `Images.get`."""
        batch = self.reader.read(self.reader.selection.rows(indices), self.size)
        return {"x": batch["x"].contiguous(), "label": batch["label"]}

    def fingerprint(self) -> str:
        """The hash of the shards' names, sizes and times of change, of the choice of samples, and of their reading."""
        table, selection = self.reader.table, self.reader.selection
        shards = [
            [m.name.rpartition("/")[2], *i] for m, i in zip(table.members, table.identities.tolist(), strict=True)
        ]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([shards, self.size, self.reader.decoding.upscale]).encode())
        chosen = torch.stack([selection.firsts, selection.counts])
        for tensor in (chosen, *(table.columns[name] for name in sorted(table.columns))):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
