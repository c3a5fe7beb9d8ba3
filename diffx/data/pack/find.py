"""What a path holds that can be packed."""

from dataclasses import dataclass
from pathlib import Path

from diffx.data.pack.arrays import idx_splits, npz_splits
from diffx.data.pack.files import folder_splits
from diffx.data.pack.parquet import parquet_splits
from diffx.data.pack.source import PackSource
from diffx.data.pack.tars import ShardSource
from diffx.data.shards.patterns import expand
from diffx.utils import DiffxError


@dataclass(frozen=True)
class Names:
    """Where to look in a file for what; None is found by its usual names.

    Arguments:
        image: the array or column of images.
        label: that of labels.
        text: that of texts.
    """

    image: str | None = None
    label: str | None = None
    text: str | None = None


def splits_of(source: str, labels: bool = True, names: Names | None = None) -> dict[str, PackSource]:
    """The splits of what a path holds: by their names, or one whose name is empty.

    Arguments:
        source: a folder of images, of idx files, of parquet files or of shards; an `.npz` or `.parquet` file; shards as
            `x-{000..099}.tar` or `'x-*.tar'`.
        labels: whether to read labels.
        names: where to look for what.

    Raises:
        DiffxError: if there is nothing, or it is damaged.
    """
    names = names or Names()
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise DiffxError(f"there is no file '{source}'; correct SOURCE")
        return npz_splits(path, names.image, names.label, labels)
    if path.suffix == ".parquet" and path.is_file():
        return parquet_splits(path, (names.image, names.label, names.text), labels)
    if path.is_dir():
        return _folder(path, labels, names)
    if path.suffix == ".tar" or ".tar" in source:
        return {"": ShardSource(expand(source, Path(), "SOURCE"), labels)}
    raise DiffxError(
        f"there is no folder or file '{source}'; give a folder of images, idx or parquet files or .tar shards, an .npz "
        "or a .parquet file, or data=CHOICE instead"
    )


def _folder(path: Path, labels: bool, names: Names) -> dict[str, PackSource]:
    shards = {split: folder for split in ("train", "test") if any((folder := path / split).glob("*.tar"))}
    if any(path.glob("*.tar")):
        return {"": ShardSource(expand(str(path), Path(), "SOURCE"), labels)}
    if shards:
        return {split: ShardSource(expand(str(folder), Path(), "SOURCE"), labels) for split, folder in shards.items()}
    if any(path.glob("*-idx?-ubyte*")):
        return idx_splits(path, labels)
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return parquet_splits(path, (names.image, names.label, names.text), labels)
    return folder_splits(path, labels)
