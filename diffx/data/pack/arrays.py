"""Arrays as something to be packed: idx files, npz files, and the images of any data set."""

import hashlib
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from diffx.data.base import DataSource, Images
from diffx.data.idx import read_idx
from diffx.data.pack.source import PackSource, Sample
from diffx.utils import DiffxError

_IMAGES = ("images", "arr_0", "x", "data", "image")
_LABELS = ("labels", "label", "arr_1", "y", "targets")
_SPLITS = {"train": ("train_{}", "{}_train"), "test": ("test_{}", "{}_test")}
_IDX = {"train": "train", "test": "t10k"}


class ArraySource(PackSource):
    """Images in memory.

    Arguments:
        where: the place, as the user will recognize it.
        images: uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, C being 1, 3 or 4.
        labels: whole numbers `[N]` or `[N, 1]`; None where there are none.
        class_names: the names of the classes; empty where they are not known.

    Raises:
        DiffxError: if the arrays are others.
    """

    def __init__(
        self, where: str, images: np.ndarray, labels: np.ndarray | None, class_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__(where, class_names)
        self.images = _channels_last(where, images)
        self.labels = None if labels is None else _checked(where, labels, len(images), len(class_names))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> Sample:
        """One image; see `PackSource.read`."""
        label = None if self.labels is None else int(self.labels[i])
        return Sample(f"{self.where}, image {i}", np.ascontiguousarray(self.images[i]), label)

    def key(self, i: int) -> str:
        """Nothing: arrays have no names."""
        return ""

    def identity(self) -> str:
        """The hash of the arrays."""
        digest = hashlib.blake2b(repr((self.images.shape, self.class_names)).encode(), digest_size=16)
        for array in (self.images, self.labels):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def blocks(self) -> list[int]:
        """None."""
        return []


class ImagesSource(PackSource):
    """One split of a data set.

    Arguments:
        where: the place, as the user will recognize it.
        images: the split.
        class_names: the names of the classes; empty where images have no labels.
    """

    def __init__(self, where: str, images: Images, class_names: tuple[str, ...]) -> None:
        super().__init__(where, class_names)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> Sample:
        """One image; see `PackSource.read`."""
        found = self.images.get(torch.tensor([i]))
        pixels = found["x"][0].permute(1, 2, 0).numpy()
        return Sample(
            f"{self.where}, image {i}", np.ascontiguousarray(pixels), int(found["label"]) if self.class_names else None
        )

    def key(self, i: int) -> str:
        """Nothing: images by position have no names."""
        return ""

    def identity(self) -> str:
        """The split's fingerprint."""
        return self.images.fingerprint()

    def blocks(self) -> list[int]:
        """None."""
        return []


def data_splits(source: DataSource, labels: bool = True) -> dict[str, PackSource]:
    """Both splits of a data set, or the training split where it has no other.

    Arguments:
        source: the data set.
        labels: whether to read labels.

    Raises:
        DiffxError: if it is missing or corrupt.
    """
    source.prepare()
    source.check()
    class_names = source.class_names if labels else ()
    found: dict[str, PackSource] = {}
    for name in ("train", "test"):
        try:
            images = source.split(name)
        except DiffxError as error:
            if name == "train":
                raise
            warnings.warn(f"only the training split is taken: {error}", stacklevel=2)
        else:
            found[name] = ImagesSource(f"data={source.name}, {name}", images, class_names)
    return found


def idx_splits(folder: Path, labels: bool = True) -> dict[str, PackSource]:
    """The two splits of a folder of idx files, `train-images-idx3-ubyte.gz` and its kin.

    Arguments:
        folder: the folder.
        labels: whether to keep labels.

    Raises:
        DiffxError: if a file is missing or corrupt.
    """
    found: dict[str, PackSource] = {}
    for split, prefix in _IDX.items():
        images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"))
        of = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte")) if labels else None
        found[split] = ArraySource(f"'{folder}', {split}", images, of)
    return found


def _idx_file(folder: Path, stem: str) -> Path:
    return next((folder / n for n in (stem, f"{stem}.gz") if (folder / n).is_file()), folder / f"{stem}.gz")


def npz_splits(path: Path, image_key: str | None, label_key: str | None, labels: bool) -> dict[str, PackSource]:
    """The arrays of an npz file: `images` and `labels`, `arr_0` and `arr_1`, `x_train` and `y_train`, …

    Arguments:
        path: the file.
        image_key: the array of the images; found by its name by default.
        label_key: the array of the labels; found by its name by default.
        labels: whether to read labels.

    Raises:
        DiffxError: if it is damaged, or holds no images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = _npz_names(path, list(file), image_key, label_key)
            return {
                split: ArraySource(
                    f"'{path}'" + (f", {split}" if split else ""),
                    file[images],
                    file[label] if label is not None and labels else None,
                )
                for split, (images, label) in names.items()
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DiffxError(f"'{path}' is damaged or no .npz of plain arrays ({error}); write it anew") from error


def _npz_names(
    path: Path, found: list[str], image_key: str | None, label_key: str | None
) -> dict[str, tuple[str, str | None]]:
    """The arrays of images and labels, by split."""
    for wanted in (image_key, label_key):
        if wanted is not None and wanted not in found:
            raise DiffxError(f"'{path}' has no array '{wanted}', only {', '.join(found)}; choose one of them")
    first = image_key or next((name for name in _IMAGES if name in found), None)
    if first is not None:
        return {"": (first, label_key or next((name for name in _LABELS if name in found), None))}
    splits: dict[str, tuple[str, str | None]] = {}
    for split, patterns in _SPLITS.items():
        for pattern in patterns:
            images = next((n for n in (pattern.format(i) for i in _IMAGES) if n in found), None)
            if images is not None:
                splits[split] = images, next((n for n in (pattern.format(k) for k in _LABELS) if n in found), None)
    if not splits:
        raise DiffxError(
            f"'{path}' has no array of images ({', '.join(_IMAGES)}), only {', '.join(found)}; set image_key=NAME and "
            "label_key=NAME"
        )
    return splits


def _channels_last(where: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[3] in (1, 3, 4):
            return images
        if images.shape[1] in (1, 3, 4):
            return images.transpose(0, 2, 3, 1)
    raise DiffxError(
        f"{where} holds {images.dtype} {list(images.shape)}; images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] "
        "of 1, 3 or 4 channels, so write them as such"
    )


def _checked(where: str, labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.shape != (count,) or flat.dtype.kind not in "iu":
        raise DiffxError(
            f"{where} holds {count} images, but labels of {labels.dtype} {list(labels.shape)}; write one whole number "
            "for each, or leave them out with classes=false"
        )
    if count and (flat.min() < 0 or (classes and flat.max() >= classes)):
        wrong = int(flat.min()) if flat.min() < 0 else int(flat.max())
        allowed = f"0..{classes - 1}" if classes else "0 or more"
        raise DiffxError(
            f"{where} has the label {wrong}, but classes are {allowed}; correct it, or leave all labels out with "
            "classes=false"
        )
    return flat.astype(np.int64)
