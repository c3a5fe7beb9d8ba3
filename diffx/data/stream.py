"""The training stream: what sample n is depends on (seed, n), never on ranks, workers, batches or restarts.

Global sample n belongs to epoch e = n // N and is image `permutation(e)[n % N]`, so that every image is seen once per
pass. Optimizer step s covers n in [s·B, (s + 1)·B).
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from diffx.data.base import Batch, DataSource, Images
from diffx.data.loader import StreamLoader
from diffx.utils import DiffxError, Keys
from diffx.utils.random import permutation


class Stream(Dataset[Batch]):
    """The endless sequence of training samples.

    Arguments:
        images: the training split, N images.
        seed: keys the order of each epoch and the flips.
        flip: whether half of the samples are mirrored left to right.
    """

    def __init__(self, images: Images, seed: int, flip: bool = False) -> None:
        self.images = images
        self.seed = seed
        self.flip = flip
        self._epochs: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __getitem__(self, n: int) -> Batch:
        """Sample n: `x` uint8 `[C, H, W]`, `label` int64 `[]`, `index` int64 `[]`."""
        return {name: value[0] for name, value in self.__getitems__([n]).items()}

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """A batch of samples, in one go.

        Arguments:
            samples: b ascending global sample numbers, a list or (cheapest) a range.

        Returns:
            `x` uint8 `[b, C, H, W]`, `label` int64 `[b]`, `index` int64 `[b]`.
        """
        if isinstance(samples, range):
            index = torch.arange(samples.start, samples.stop, samples.step)
        else:
            index = torch.as_tensor(samples, dtype=torch.int64)
        positions, mirrored = self._look_up(index, samples[0], samples[-1])
        batch = self.images.get(positions)
        if self.flip:
            _mirror(batch["x"].numpy(), mirrored.numpy())
        batch["index"] = index
        return batch

    def _look_up(self, index: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
        """The position in the data set, int64 `[b]`, and whether it is mirrored, bool `[b]`, of each sample."""
        count = len(self.images)
        epochs = range(lowest // count, highest // count + 1)
        if len(epochs) == 1:
            order, mirrored = self._epoch(epochs[0])
            within = index - epochs[0] * count
            return order.index_select(0, within), mirrored.index_select(0, within)
        parts = [self._look_up(part, int(part[0]), int(part[-1])) for part in _by_epoch(index, count)]
        positions, mirrored = zip(*parts, strict=True)
        return torch.cat(positions), torch.cat(mirrored)

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of one pass, int64 `[N]`, and which of its samples are mirrored, bool `[N]`.

        Drawn for the whole pass: for each batch on its own it would cost more than all the rest of it.
        """
        if epoch not in self._epochs:
            # a batch seldom touches more than the end of one epoch and the start of the next
            if len(self._epochs) == 2:
                self._epochs.popitem(last=False)
            count = len(self.images)
            index = torch.arange(epoch * count, (epoch + 1) * count)
            mirrored = Keys(self.seed, index).uniform("flip") < 0.5
            self._epochs[epoch] = permutation(self.seed, "order", epoch, count), mirrored
        return self._epochs[epoch]


def _by_epoch(index: Tensor, count: int) -> tuple[Tensor, ...]:
    sizes = (index // count).unique_consecutive(return_counts=True)[1]
    return index.split(sizes.tolist())


def _mirror(x: np.ndarray, mirrored: np.ndarray) -> None:
    # numpy, because it is four times faster than torch at this
    x[mirrored] = x[mirrored][..., ::-1]


class GlobalBatches(Sampler[range]):
    """The sample numbers of one rank's micro-batches, without end.

    The global batch of a step is cut into `world_size · accumulate` equal chunks; micro-batch m of rank r is chunk
    number m · world_size + r.

    Arguments:
        batch_size: the global batch B.
        start_step: the optimizer step to start at.
        rank: this process, 0..world_size-1.
        world_size: the number of processes.
        accumulate: micro-batches per optimizer step on each rank.

    Raises:
        DiffxError: if the batch cannot be cut evenly, naming the nearest sizes that can.
    """

    def __init__(
        self, batch_size: int, start_step: int = 0, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> None:
        chunks = world_size * accumulate
        if batch_size % chunks:
            below = batch_size // chunks * chunks
            sizes = f"{below} or {below + chunks}" if below else f"{chunks}"
            raise DiffxError(
                f"data.batch_size={batch_size} cannot be shared evenly by {world_size} processes with {accumulate} "
                f"accumulated micro-batches each; set data.batch_size={sizes}"
            )
        self.batch_size = batch_size
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate

    def __iter__(self) -> Iterator[range]:
        size = self.batch_size // (self.world_size * self.accumulate)
        for step in itertools.count(self.start_step):
            for micro in range(self.accumulate):
                first = step * self.batch_size + (micro * self.world_size + self.rank) * size
                yield range(first, first + size)


def train_loader(
    source: DataSource,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    pin_memory: bool = False,
) -> StreamLoader:
    """The loader of every source whose images have positions; arguments and batches as in `DataSource.train_loader`.

    Raises:
        DiffxError: if `source.batch_size` cannot be shared evenly, or the training split cannot be read.
    """
    batches = GlobalBatches(source.batch_size, start_step, rank, world_size, accumulate)
    images = source.split("train")
    return StreamLoader(
        Stream(images, seed, source.flip), batches, 0 if images.in_memory else source.num_workers, pin_memory
    )
