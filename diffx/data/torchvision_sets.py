"""The published sets that torchvision downloads: MNIST, Fashion-MNIST and CIFAR-10.

torchvision takes seconds to import, so that it is imported only where it is used.
"""

import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch

from diffx.data.base import SplitName, TensorImages
from diffx.data.idx import read_idx, read_idx_shape
from diffx.data.map_source import Found, MapSource
from diffx.utils import DiffxError

_CIFAR10_FOLDER = "cifar-10-batches-py"
_PREFIXES: dict[SplitName, str] = {"train": "train", "test": "t10k"}


class IdxSource(MapSource):
    """A set of idx files: images and labels of a training and a test split. A new one writes `class_names` and `fetch`.

    The four files (`train-images-idx3-ubyte`, …, with or without `.gz`) may lie in `root`, in `root/<name>`, or where
    torchvision puts them, `root/<name of its class>/raw`.

    Arguments:
        root: the folder of the files, or the one above.
        download: whether missing files are downloaded.
        folder: the folder that the download makes in `root`.
        counts: the published numbers of training and test images.
        settings: as `DataSource`.
    """

    def __init__(self, *, root: str, download: bool, folder: str, counts: tuple[int, int], **settings) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.download = download
        self._folder = folder
        self._counts = counts

    @abstractmethod
    def fetch(self, root: Path) -> None:
        """Downloads the files to `root/<folder>/raw`."""

    def prepare(self) -> None:
        """Downloads the files if they are missing and `download` allows; see `DataSource.prepare`."""
        if self.download and self._find() is None:
            _download(self.fetch, self.root, self._folder, self.name)

    def inspect(self) -> Found:
        """What the headers state; the published shape before the download."""
        folder = self._find()
        if folder is None:
            if not self.download:
                raise self._missing()
            return Found("the published set", 1, 28, 28, len(self.class_names), *self._counts)
        (train, height, width), (test, *size) = (self._shape(folder, name) for name in ("train", "test"))
        if size != [height, width]:
            raise DiffxError(
                f"the training and test images in '{folder}' differ in size; put two splits of one set there"
            )
        return Found(f"'{folder}'", 1, height, width, len(self.class_names), train, test)

    def load(self, name: SplitName) -> TensorImages:
        """Reads one split; see `MapSource.load`."""
        folder = self._find()
        if folder is None:
            raise self._missing()
        self._shape(folder, name)
        images = torch.from_numpy(read_idx(_idx_path(folder, name, "images")))
        labels = torch.from_numpy(read_idx(_idx_path(folder, name, "labels"))).to(torch.int64)
        if len(labels) and labels.max() >= len(self.class_names):
            raise DiffxError(
                f"'{_idx_path(folder, name, 'labels')}' has label {labels.max()}, but data={self.name} has labels "
                f"0..{len(self.class_names) - 1}; set data.root to the files of that set"
            )
        return TensorImages(images[:, None], labels)

    def _find(self) -> Path | None:
        """The first folder with an idx file of the set; None if there is none."""
        for folder in (self.root, self.root / self.name, self.root / self._folder / "raw"):
            if any(folder.glob("*-idx?-ubyte*")):
                return folder
        return None

    def _missing(self) -> DiffxError:
        return DiffxError(
            f"the idx files of data={self.name} are not in '{self.root}'; set data.root to the folder that holds "
            "train-images-idx3-ubyte.gz and its kin, or data.download=true where there is internet"
        )

    def _shape(self, folder: Path, name: SplitName) -> tuple[int, ...]:
        """`(N, height, width)` of one split, from the two headers."""
        images = _idx_path(folder, name, "images")
        labels = _idx_path(folder, name, "labels")
        shape, label_shape = read_idx_shape(images), read_idx_shape(labels)
        if len(shape) != 3 or label_shape != shape[:1]:
            raise DiffxError(
                f"'{images}' holds an array {list(shape)} and '{labels.name}' one {list(label_shape)}, which are not "
                "N images with N labels; fetch them again"
            )
        return shape


class FashionMNIST(IdxSource):
    """70,000 grey 28×28 images of ten kinds of clothes (Xiao, Rasul and Vollgraf, *Fashion-MNIST*, arXiv 1708.07747).

    Arguments:
        root: where the files lie or will lie; see `IdxSource`.
        download: whether missing files are downloaded.
        settings: as `DataSource`.
    """

    def __init__(self, *, root: str, download: bool = True, **settings) -> None:
        super().__init__(root=root, download=download, folder="FashionMNIST", counts=(60_000, 10_000), **settings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten kinds of clothes."""
        return (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        )

    def fetch(self, root: Path) -> None:
        """Downloads the files."""
        from torchvision import datasets

        datasets.FashionMNIST(root, download=True)


class MNIST(IdxSource):
    """70,000 grey 28×28 images of handwritten digits (LeCun, Cortes and Burges, *The MNIST database*, 1998).

    Arguments:
        root: where the files lie or will lie; see `IdxSource`.
        download: whether missing files are downloaded.
        settings: as `DataSource`.
    """

    def __init__(self, *, root: str, download: bool = True, **settings) -> None:
        super().__init__(root=root, download=download, folder="MNIST", counts=(60_000, 10_000), **settings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def fetch(self, root: Path) -> None:
        """Downloads the files."""
        from torchvision import datasets

        datasets.MNIST(root, download=True)


class CIFAR10(MapSource):
    """60,000 colour 32×32 images of ten classes (Krizhevsky, *Learning multiple layers of features*, 2009).

    Read from torchvision's folder `cifar-10-batches-py`, in `root` or in `root/<name>`; torchvision compares the check
    sum of each file with the published one before unpickling it. CIFAR-10 as image files is `data=folder`.

    Arguments:
        root: where the folder lies or will lie.
        download: whether it is downloaded if it is missing.
        settings: as `DataSource`.
    """

    def __init__(self, *, root: str, download: bool = True, **settings) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.download = download

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten classes."""
        return ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def prepare(self) -> None:
        """Downloads the files if they are missing and `download` allows; see `DataSource.prepare`."""
        if self.download and self._find() is None:
            _download(self._fetch, self.root, _CIFAR10_FOLDER, self.name)

    def inspect(self) -> Found:
        """What is known of the set, once the folder is there or may be downloaded."""
        found = self._find()
        if found is None and not self.download:
            raise self._missing()
        return Found("the published set" if found is None else f"'{found}'", 3, 32, 32, 10, 50_000, 10_000)

    def load(self, name: SplitName) -> TensorImages:
        """Reads one split; see `MapSource.load`."""
        root = self._find()
        if root is None:
            raise self._missing()
        from torchvision import datasets

        try:
            published = datasets.CIFAR10(root, train=name == "train")
        except RuntimeError as error:
            raise DiffxError(
                f"'{root / _CIFAR10_FOLDER}' is incomplete or not as published; delete that folder and set "
                "data.download=true, or read image files with data=folder"
            ) from error
        return TensorImages(torch.from_numpy(published.data).permute(0, 3, 1, 2), torch.tensor(published.targets))

    def _fetch(self, root: Path) -> None:
        from torchvision import datasets

        datasets.CIFAR10(root, download=True)

    def _find(self) -> Path | None:
        """The folder that holds torchvision's; None if there is none."""
        for root in (self.root, self.root / self.name):
            if (root / _CIFAR10_FOLDER).is_dir():
                return root
        return None

    def _missing(self) -> DiffxError:
        return DiffxError(
            f"'{self.root}' has no folder {_CIFAR10_FOLDER}; set data.root to the folder that holds it, set "
            "data.download=true where there is internet, or read CIFAR-10 as image files with data=folder"
        )


def _idx_path(folder: Path, name: SplitName, what: str) -> Path:
    stem = f"{_PREFIXES[name]}-{what}-idx{3 if what == 'images' else 1}-ubyte"
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DiffxError(f"'{folder}' lacks {stem}.gz; put the four files of the set there, or delete it to download all")


def _download(fetch: Callable[[Path], None], root: Path, folder: str, name: str) -> None:
    """Downloads into a temporary folder and renames, so that an interrupted download leaves nothing half-done."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder}.", dir=root) as temporary:
            fetch(Path(temporary))
            (Path(temporary) / folder).replace(root / folder)
    except Exception as error:  # whatever the libraries below raise
        if (root / folder).is_dir():
            return  # another process was quicker
        raise DiffxError(
            f"data={name} cannot be downloaded to '{root}' ({_first_line(error)}); fetch it on a machine with internet "
            "and set data.root to its folder"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
