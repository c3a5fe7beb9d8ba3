"""Training on latents that were encoded before."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffx.data.base import Batch, DataSource, Images, SplitName
from diffx.data.latents.stream import MIRRORED, MOMENTS, LatentStream, labels, places
from diffx.data.loader import StreamLoader
from diffx.data.pack.manifest import Manifest
from diffx.data.shards.index import open_index
from diffx.data.shards.order import Windows
from diffx.data.shards.source import WebDataset
from diffx.data.shards.table import Member, Table
from diffx.data.stream import GlobalBatches
from diffx.utils import DiffxError, nearest


class Latents(DataSource):
    """The latents that `diffx data encode` has stored, in the order in which data=webdataset reads shards.

    Batches have `moments`, float `[b, 2c, h, w]`, mean and log-variance of the latents, from which the autoencoder
    draws anew each time; `label`; and `index`. Channels and size as they are set are those of a latent, since they are
    what the backbone sees; `self.channels` and `self.image_size` are those of the images, since they are what is
    measured. Use it when the autoencoder is larger than the denoiser, or training has many passes.

    Arguments:
        shards: the folder that `diffx data encode` has written.
        images: a folder that `diffx data pack` has written, of the images that samples are compared with (its folders
            `train` and `test`, where it has them); None where there are none.
        root: where relative paths start.
        channels: channels of a latent, c.
        image_size: height and width of a latent.
        decoded_channels: channels of an image.
        decoded_size: height and width of an image in pixels.
        shuffle_shards: how many shards are mixed at a time; 0 for all.
        settings: as `DataSource`; `flip` chooses between a latent and that of the mirrored image.
    """

    def __init__(
        self,
        *,
        shards: str,
        images: str | None = None,
        root: str = ".",
        channels: int = 4,
        image_size: int = 32,
        decoded_channels: int = 3,
        decoded_size: int = 256,
        shuffle_shards: int = 64,
        **settings,
    ) -> None:
        super().__init__(channels=decoded_channels, image_size=decoded_size, **settings)
        if shuffle_shards < 0:
            raise DiffxError(f"data.shuffle_shards is {shuffle_shards}; set it to a whole number of at least 0")
        self.folder = Path(root).expanduser() / Path(shards).expanduser()
        self.images = None if images is None else Path(root).expanduser() / Path(images).expanduser()
        self.shape = (channels, image_size, image_size)
        self.shuffle_shards = shuffle_shards

    @cached_property
    def manifest(self) -> Manifest:
        """What the shards hold.

        Raises:
            DiffxError: if there is none, or it is one of images.
        """
        if not self.folder.is_dir():
            raise DiffxError(
                f"there is no folder '{self.folder}'; set data.shards to the one that diffx data encode has written"
            )
        manifest = Manifest.load(self.folder)
        if not manifest.latents:
            raise DiffxError(f"'{self.folder}' holds images, no latents; encode them first: diffx data encode")
        return manifest

    @property
    def encoded_by(self) -> str:
        """The fingerprint of the autoencoder; empty where the shards are not on this machine."""
        return self.manifest.latents["autoencoder"]["fingerprint"] if self.folder.is_dir() else ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; their numbers where they have none."""
        return self.manifest.class_names or tuple(map(str, range(self.num_classes)))

    def prepare(self) -> None:
        """Nothing to do."""

    def check(self) -> None:
        """Compares the settings with the manifest; see `DataSource.check`."""
        latents = self.manifest.latents
        shape, (channels, height, _) = tuple(latents["shape"]), latents["image"]
        for key, declared, found in (
            ("channels", self.shape[0], shape[0]),
            ("image_size", self.shape[1], shape[1]),
            ("decoded_channels", self.channels, channels),
            ("decoded_size", self.image_size, height),
        ):
            if declared != found:
                raise DiffxError(f"data.{key} is {declared}, but '{self.folder}' has {found}; set data.{key}={found}")
        if self.num_classes not in (0, self.manifest.num_classes):
            found = self.manifest.num_classes
            raise DiffxError(
                f"data.num_classes is {self.num_classes}, but '{self.folder}' has {found}; set data.num_classes={found}"
            )
        if self.flip and not latents["flip"]:
            raise DiffxError(
                f"'{self.folder}' has no latents of mirrored images; encode them with flip=true, or set data.flip=false"
            )
        _ = self._table
        if self.images is not None:
            self._images.check()

    def split(self, name: SplitName) -> Images:
        """The images, not the latents, of one split; the training split has none where `images` is not set.

        Raises:
            DiffxError: if there are no test images, or a shard is damaged.
        """
        if name not in ("train", "test"):
            raise DiffxError(f"no split is called '{name}'{nearest(name, ('train', 'test'))}; use train or test")
        if self.images is not None:
            return self._images.split(name)
        if name == "test":
            raise DiffxError(_NO_IMAGES)
        return NoImages()

    def train_loader(
        self,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pin_memory: bool = False,
    ) -> StreamLoader:
        """The endless training stream of one rank; see `DataSource.train_loader`.

        Returns:
            Batches of `moments`, float16 or float32 `[b, 2c, h, w]`, `label` int64 `[b]` and `index` int64 `[b]`.
        """
        batches = GlobalBatches(self.batch_size, start_step, rank, world_size, accumulate)
        selection = self._table.group(0)
        order = Windows(selection.firsts, selection.counts, self.shuffle_shards, seed)
        c, h, w = self.shape
        stream = LatentStream(self._table, order, seed, (2 * c, h, w), self.manifest.latents["dtype"], self.flip)
        return StreamLoader(stream, batches, self.num_workers, pin_memory)

    def describe(self) -> str:
        """One line, "latents: 50,000 latents of 4×16×16 numbers, of images of 3×32×32 pixels, 10 classes, …"."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        c, h, w = self.shape
        return (
            f"{self.name}: {self.manifest.count:,} latents of {c}×{h}×{w} numbers, of images of {self.channels}×"
            f"{self.image_size}×{self.image_size} pixels, {classes}, in {len(self.manifest.shards)} shards of "
            f"'{self.folder}'"
        )

    @cached_property
    def _images(self) -> WebDataset:
        assert self.images is not None
        test = self.images / "test"
        return WebDataset(
            name=f"{self.name} images",
            shards=str(self.images / "train" if (self.images / "train").is_dir() else self.images),
            test_shards=str(test) if test.is_dir() else None,
            test_fraction=0.0,
            on_error="raise",
            channels=self.channels,
            image_size=self.image_size,
            num_classes=self.num_classes,
            batch_size=self.batch_size,
            flip=False,
            num_workers=self.num_workers,
        )

    @cached_property
    def _table(self) -> Table:
        paths = [self.folder / shard.name for shard in self.manifest.shards]
        indexes = [open_index(path) for path in paths]
        for path, index, shard in zip(paths, indexes, self.manifest.shards, strict=True):
            if index.size != shard.bytes or len(index) != shard.count:
                raise DiffxError(f"'{path}' is not the shard that the manifest describes; copy or encode it again")
        c, h, w = self.shape
        dtype = np.dtype(self.manifest.latents["dtype"])
        wanted = [MOMENTS, *([MIRRORED] if self.manifest.latents["flip"] else [])]
        columns = {
            name: torch.from_numpy(np.concatenate([places(index, name, (2 * c, h, w), dtype) for index in indexes]))
            for name in wanted
        }
        columns["label"] = torch.from_numpy(np.concatenate([labels(index, self.num_classes) for index in indexes]))
        ends = torch.tensor([len(index) for index in indexes]).cumsum(0)
        counts = torch.tensor([len(index) for index in indexes])
        identities = torch.tensor(
            [[index.size, path.stat().st_mtime_ns] for path, index in zip(paths, indexes, strict=True)]
        )
        columns["offset"], columns["raw"] = columns[MOMENTS], torch.ones(int(ends[-1]), dtype=torch.bool)
        return Table(
            [Member(str(path)) for path in paths], identities, torch.stack([ends - counts, ends], 1), columns, {}
        )


_NO_IMAGES = (
    "data=latents has no images to compare samples with; set data.images to the folder of the packed images or "
    "evaluation.reference=FILE.npz, or measure nothing: evaluation.num_samples=0 evaluation.interim_samples=0"
)


class NoImages(Images):
    """A split without images: whoever wants to compare with it is told what to do."""

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return 0

    def get(self, indices: Tensor) -> Batch:
        """Raises."""
        raise DiffxError(_NO_IMAGES)

    def fingerprint(self) -> str:
        """Raises."""
        raise DiffxError(_NO_IMAGES)
