"""Folders of image files as something to be packed."""

import hashlib
from pathlib import Path, PurePosixPath

from diffx.data.listing import Listing, list_images, matching
from diffx.data.pack.source import PackSource, Sample
from diffx.utils import DiffxError

_TEST_NAMES = ("test", "val", "validation")
_BESIDE = ("txt", "json")


class FolderSource(PackSource):
    """Image files, with `name.txt` and `name.json` beside `name.jpg` as further parts.

    Arguments:
        listing: the files.
    """

    def __init__(self, listing: Listing) -> None:
        super().__init__(f"'{listing.folder}'", listing.classes)
        self.listing = listing

    def __len__(self) -> int:
        return len(self.listing.names)

    def read(self, i: int) -> Sample:
        """One file and what lies beside it; see `PackSource.read`."""
        path = self.listing.folder / self.listing.names[i]
        try:
            extras = {
                kind: beside.read_bytes() for kind in _BESIDE if (beside := path.with_suffix(f".{kind}")).is_file()
            }
            image = path.read_bytes()
        except OSError as error:
            raise DiffxError(f"'{path}' cannot be read ({error.strerror}); replace or remove it") from error
        return Sample(str(path), image, self.listing.labels[i] if self.listing.classes else None, extras)

    def key(self, i: int) -> str:
        """The path below the folder, without its suffix."""
        path = PurePosixPath(self.listing.names[i])
        return str(path.with_name(path.stem.replace(".", "_")))

    def identity(self) -> str:
        """The hash of all names and classes."""
        text = "\n".join((*self.listing.classes, "", *self.listing.names))
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def blocks(self) -> list[int]:
        """None: files are read one by one."""
        return []


def folder_splits(folder: Path, labels: bool) -> dict[str, PackSource]:
    """The splits of a folder: `train` and `test` (or `val`) where it has such folders, otherwise one without a name.

    Arguments:
        folder: the folder.
        labels: whether its subfolders are classes.

    Raises:
        DiffxError: if there are no images, or class folders are empty or differ between the splits.
    """
    train, test = folder / "train", next((folder / n for n in _TEST_NAMES if (folder / n).is_dir()), None)
    try:
        if train.is_dir() and test is not None:
            found = matching(list_images(train, labels), list_images(test, labels))
            return {str(name): FolderSource(listing) for name, listing in found.items()}
        return {"": FolderSource(list_images(folder, labels))}
    except DiffxError as error:
        said = str(error).replace(" and data.num_classes=0", "").replace("data.root", "SOURCE")
        raise DiffxError(said.replace("data.labels", "classes")) from error
