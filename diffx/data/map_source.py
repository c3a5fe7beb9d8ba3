"""What all sources share whose images have positions: checking, caching and streaming."""

from abc import abstractmethod
from dataclasses import dataclass

from torch.utils.data import DataLoader

from diffx.data.base import Batch, DataSource, Images, SplitName
from diffx.data.stream import train_loader
from diffx.utils import DiffxError, nearest


@dataclass(frozen=True)
class Found:
    """What a source's files hold, learnt without reading them all.

    Arguments:
        where: the place, as the user will recognize it in a message.
        channels: channels of an image.
        height: height of an image in pixels.
        width: width of an image in pixels.
        num_classes: number of classes, 0 for none.
        train: number of training images.
        test: number of test images.
    """

    where: str
    channels: int
    height: int
    width: int
    num_classes: int
    train: int
    test: int


class MapSource(DataSource):
    """A source of indexed images. A new one writes `class_names`, `prepare`, `inspect` and `load`.

    Arguments:
        settings: as `DataSource`.
    """

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self._splits: dict[str, Images] = {}

    @abstractmethod
    def inspect(self) -> Found:
        """What the files hold, cheaply: names, sizes and headers.

        Raises:
            DiffxError: if files are missing or not what they should be.
        """

    @abstractmethod
    def load(self, name: SplitName) -> Images:
        """Reads one split.

        Raises:
            DiffxError: if a file is missing or corrupt, naming it.
        """

    def check(self) -> None:
        """Compares the settings with what is found; see `DataSource.check`."""
        found = self.inspect()
        if found.height != found.width:
            raise DiffxError(
                f"the images of {found.where} are {found.height}×{found.width} pixels, and only square ones can be "
                "used; crop them, or read them as image files with data=folder"
            )
        for key, declared, value in (
            ("channels", self.channels, found.channels),
            ("image_size", self.image_size, found.height),
            ("num_classes", self.num_classes, found.num_classes),
        ):
            if declared != value:
                raise DiffxError(f"data.{key} is {declared}, but {found.where} has {value}; set data.{key}={value}")

    def split(self, name: SplitName) -> Images:
        """The images of one split, kept after the first call; see `DataSource.split`."""
        if name not in ("train", "test"):
            raise DiffxError(f"no split is called '{name}'{nearest(name, ('train', 'test'))}; use train or test")
        if name not in self._splits:
            self.check()
            images = self.load(name)
            if not len(images):
                raise DiffxError(
                    f"the {name} split of data={self.name} has no images; set data.test_fraction or data.root"
                )
            self._splits[name] = images
        return self._splits[name]

    def train_loader(
        self,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pin_memory: bool = False,
    ) -> DataLoader[Batch]:
        """The endless training stream of one rank; see `DataSource.train_loader`."""
        return train_loader(self, seed, start_step, rank, world_size, accumulate, pin_memory)

    def describe(self) -> str:
        """One line, "digits: 1,437 train and 360 test images of 1×8×8 pixels, 10 classes, from scikit-learn"."""
        found = self.inspect()
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        return (
            f"{self.name}: {found.train:,} train and {found.test:,} test images of "
            f"{self.channels}×{self.image_size}×{self.image_size} pixels, {classes}, from {found.where}"
        )
