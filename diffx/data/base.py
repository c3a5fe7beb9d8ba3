"""What a data set is: splits of uint8 images, and a source that knows them and streams the training split."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffx.utils import DiffxError

Batch = dict[str, Tensor]
SplitName = Literal["train", "test"]


class Images(Dataset[Batch], ABC):
    """One split: images as they are in the data set, never augmented. Reference statistics are read from here."""

    @property
    @abstractmethod
    def in_memory(self) -> bool:
        """Whether `get` is a mere copy, so that handing batches from worker to worker would cost more than it saves."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images N."""

    @abstractmethod
    def get(self, indices: Tensor) -> Batch:
        """Images by their position in the data set.

        Arguments:
            indices: positions in 0..N-1, int64 `[b]`.

        Returns:
            `x`, uint8 `[b, C, H, W]`, and `label`, int64 `[b]` (all 0 where images have no labels), on the CPU: copies
            that the caller may change.

        Raises:
            DiffxError: if a file cannot be read any more, naming it.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change when the images or labels do."""

    def __getitem__(self, index: int) -> Batch:
        """One image `x`, uint8 `[C, H, W]`, and its `label`, int64 `[]`."""
        return {name: value[0] for name, value in self.get(torch.tensor([index])).items()}


class TensorImages(Images):
    """A split held in memory.

    Arguments:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`; all 0 where there are none.

    Raises:
        ValueError: if the types or shapes are others.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
        self.images = images.contiguous()
        self.labels = labels.contiguous()
        self._fingerprint = ""

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Tensor) -> Batch:
        """Images by position; see `Images.get`."""
        return {"x": self.images.index_select(0, indices), "label": self.labels.index_select(0, indices)}

    def fingerprint(self) -> str:
        """The hash of shape, pixels and labels."""
        if not self._fingerprint:
            digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
            digest.update(self.images.numpy().data)
            digest.update(self.labels.numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class DataSource(ABC):
    """A data set and how training reads it: what `configs/data/*.yaml` builds.

    Arguments:
        name: how the set is called in tables and file names.
        channels: channels of an image, C.
        image_size: height and width of an image in pixels.
        num_classes: number of classes; 0 where images have no labels.
        batch_size: the GLOBAL batch: images per optimizer step, over all ranks and accumulated micro-batches.
        flip: whether training mirrors half of the images, chosen by the global sample number.
        num_workers: processes that read ahead, per rank; 0 reads in the training process, and so does, whatever this
            says, a split that is held in memory.

    Raises:
        DiffxError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        name: str,
        channels: int,
        image_size: int,
        num_classes: int,
        batch_size: int,
        flip: bool,
        num_workers: int,
    ) -> None:
        for key, value, least in (
            ("channels", channels, 1),
            ("image_size", image_size, 1),
            ("num_classes", num_classes, 0),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise DiffxError(f"data.{key} is {value!r}; set it to a whole number of at least {least}")
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.num_workers = num_workers

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, in order; empty where images have no labels."""

    @abstractmethod
    def prepare(self) -> None:
        """Downloads what is missing. Called once, by one process, before the ranks start.

        Raises:
            DiffxError: if the download fails, with the remedy.
        """

    @abstractmethod
    def check(self) -> None:
        """Compares the settings with the files, without reading all of them: cheap enough before every training.

        Raises:
            DiffxError: if files are missing or corrupt, or hold other channels, sizes or classes than the settings say.
        """

    @abstractmethod
    def split(self, name: SplitName) -> Images:
        """The images of one split, loaded on the first call and kept.

        Raises:
            DiffxError: if the name is neither "train" nor "test", the split is empty, or a file is missing or corrupt.
        """

    @abstractmethod
    def train_loader(
        self,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pin_memory: bool = False,
    ) -> Iterable[Batch]:
        """The endless training stream of one rank, a function of (seed, global sample number) alone.

        A source with an order of its own, such as that of shards, implements it in its own way.

        Arguments:
            seed: the seed of the run: it keys order and flips.
            start_step: the optimizer step to start at, to resume.
            rank: this process, 0..world_size-1.
            world_size: the number of processes.
            accumulate: micro-batches per optimizer step on each rank.
            pin_memory: whether batches are put into page-locked memory, for copies to a GPU.

        Returns:
            Batches of `batch_size / (world_size · accumulate)` samples: `x` uint8 `[b, C, H, W]`, `label` int64 `[b]`,
            `index` int64 `[b]` (the global sample number), and what the source adds, such as captions.

        Raises:
            DiffxError: if `batch_size` cannot be shared evenly.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line: the name, the number of images, their shape and classes."""
