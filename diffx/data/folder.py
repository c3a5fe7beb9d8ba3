"""Any folder of image files."""

from functools import cached_property
from pathlib import Path

import torch

from diffx.data.base import Images, SplitName
from diffx.data.decode import read_image
from diffx.data.file_images import FileImages
from diffx.data.listing import Listing, divided, list_images, matching
from diffx.data.map_source import Found, MapSource
from diffx.utils import DiffxError

_TEST_NAMES = ("test", "val")


class Folder(MapSource):
    """Image files below a folder.

    Classes: with `labels`, each subfolder is a class, in the order of sorted names; files in deeper folders belong to
    it too. Without subfolders, or with `labels=False`, images have no labels and `num_classes` is 0.

    Splits: `root/train` and `root/test` (or `root/val`) where they exist; otherwise `test_fraction` of each class is
    held out, chosen by the files' names, so that it is the same on every machine.

    Images are cropped, scaled and converted as `read_image` documents. Files with other suffixes than those of images,
    and names that start with a dot, are left alone. What fits into `cache_bytes` is decoded into memory at the start,
    which also finds every corrupt file before training; larger sets have their headers verified, and are decoded as
    training goes.

    Arguments:
        root: the folder.
        labels: whether subfolders are classes.
        test_fraction: the share that is held out, in [0, 1), where there are no folders for the splits.
        upscale: whether images smaller than `image_size` are enlarged, instead of refused.
        cache_bytes: the most memory for the decoded images of one split.
        settings: as `DataSource`; `channels` is 1 or 3.

    Raises:
        DiffxError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        root: str,
        labels: bool = True,
        test_fraction: float = 0.1,
        upscale: bool = False,
        cache_bytes: int = 2**30,
        **settings,
    ) -> None:
        super().__init__(**settings)
        if self.channels not in (1, 3):
            raise DiffxError(f"data.channels is {self.channels}; image files are read with data.channels=1 or 3")
        if not 0 <= test_fraction < 1:
            raise DiffxError(f"data.test_fraction is {test_fraction}; set it to at least 0 and less than 1")
        self.root = Path(root).expanduser()
        self.labels = labels
        self.test_fraction = test_fraction
        self.upscale = upscale
        self.cache_bytes = cache_bytes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the class folders, sorted; empty where images have no labels."""
        return self._splits_found["train"].classes

    def prepare(self) -> None:
        """Nothing to download."""

    def inspect(self) -> Found:
        """What the folders hold; one image is read to see that it can be."""
        splits = self._splits_found
        for split in splits.values():
            if split.names:
                read_image(split.folder / split.names[0], self.channels, self.image_size, self.upscale)
        classes, (train, test) = len(self.class_names), (len(splits[name].names) for name in ("train", "test"))
        return Found(f"'{self.root}'", self.channels, self.image_size, self.image_size, classes, train, test)

    def load(self, name: SplitName) -> Images:
        """Decodes one split into memory, or verifies its headers if it is too large; see `MapSource.load`."""
        listing = self._splits_found[name]
        labels = torch.tensor(listing.labels, dtype=torch.int64)
        images = FileImages(listing.folder, listing.names, labels, self.channels, self.image_size, self.upscale)
        if len(images) * self.channels * self.image_size**2 <= self.cache_bytes:
            return images.decoded(f"decoding the {name} images of {self.name}")
        images.verify(f"checking the {name} images of {self.name}")
        return images

    @cached_property
    def _splits_found(self) -> dict[SplitName, Listing]:
        if not self.root.is_dir():
            raise DiffxError(f"there is no folder '{self.root}'; set data.root to the folder of the images")
        train = self.root / "train"
        test = next((self.root / name for name in _TEST_NAMES if (self.root / name).is_dir()), None)
        if train.is_dir() and test is not None:
            return matching(list_images(train, self.labels), list_images(test, self.labels))
        if train.is_dir():
            raise DiffxError(
                f"'{self.root}' has a folder train but neither test nor val; add one, or set data.root={train} to hold "
                "images out of it"
            )
        return divided(list_images(self.root, self.labels), self.test_fraction)
