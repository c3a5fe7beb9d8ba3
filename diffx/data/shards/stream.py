"""The training stream from shards: sample n is a function of (seed, n) and the shards."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffx.data.base import Batch
from diffx.data.decode import Crop
from diffx.data.shards.order import Mixed, Order
from diffx.data.shards.patterns import is_remote
from diffx.data.shards.reader import ShardReader
from diffx.utils import Keys


class ShardStream(Dataset[Batch]):
    """The endless sequence of training samples.

    Arguments:
        reader: reads the rows.
        order: which row is sample n.
        seed: keys mirroring, crops and the loss of captions.
        size: height and width of the images.
        buckets: heights and widths of the images of each bucket, where `order` chooses a bucket for each step.
        flip: whether half of the images are mirrored left to right.
        random_crop: the smallest share of the shorter side that a random crop may have; None to crop at the centre.
        caption_dropout: the share of captions that are left empty.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        seed: int,
        size: tuple[int, int],
        *,
        buckets: Sequence[tuple[int, int]] = (),
        flip: bool = False,
        random_crop: float | None = None,
        caption_dropout: float = 0.0,
    ) -> None:
        self.reader = reader
        self.order = order
        self.seed = seed
        self.size = size
        self.buckets = list(buckets)
        self.flip = flip
        self.random_crop = random_crop
        self.caption_dropout = caption_dropout
        self._remote = any(is_remote(member.name) for member in reader.table.members)
        self._ahead: list[int] = []

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """A batch of samples of one step.

        Arguments:
            samples: b ascending global sample numbers, a list or (cheapest) a range.

        Returns:
            As `ShardReader.read`, with `index` int64 `[b]`, the sample numbers.
        """
        if isinstance(samples, range):
            index = torch.arange(samples.start, samples.stop, samples.step)
        else:
            index = torch.as_tensor(samples, dtype=torch.int64)
        if self._remote:
            self._fetch_ahead(int(index[0]))
        keys = Keys(self.seed, index)
        batch = self.reader.read(
            self.order.rows(index),
            self._size_at(int(index[0])),
            None if self.random_crop is None else self._crops(keys, self.random_crop),
            keys.uniform("flip") < 0.5 if self.flip else None,
        )
        batch["index"].copy_(index)
        if self.caption_dropout:
            lost = keys.uniform("caption_drop") < self.caption_dropout
            batch["text"][lost] = 0
            batch["text_length"][lost] = 0
        return batch

    def _size_at(self, n: int) -> tuple[int, int]:
        if not self.buckets:
            return self.size
        assert isinstance(self.order, Mixed)
        return self.buckets[self.order.choice(n)]

    def _crops(self, keys: Keys, least: float) -> list[Crop]:
        # as in ADM's random crop (arXiv 2105.05233), the zoom is uniform, not the share
        zoom, left, top = _columns(keys.uniform("crop", 3))
        return [Crop(1 + z * (1 / least - 1), x, y) for z, x, y in zip(zoom, left, top, strict=True)]

    def _fetch_ahead(self, n: int) -> None:
        shards = self.order.shards(n)
        if shards != self._ahead:
            self._ahead = shards
            table = self.reader.table
            found = [(table.members[s].name, int(table.identities[s, 0])) for s in shards]
            self.reader.files.copies.ahead([shard for shard in found if is_remote(shard[0])])


def _columns(values: Tensor) -> list[list[float]]:
    return values.T.tolist()
