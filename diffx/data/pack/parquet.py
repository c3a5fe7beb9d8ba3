"""Parquet files with images in them, as Hugging Face writes data sets, as something to be packed."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from diffx.data.pack.source import PackSource, Sample
from diffx.utils import DiffxError

_IMAGES = ("image", "img", "jpg", "png", "images")
_LABELS = ("label", "labels", "fine_label", "cls")
_TEXTS = ("text", "caption", "txt")
_KEPT_GROUPS = 24
_SPLITS = {"train": ("train",), "test": ("test", "validation", "val", "valid")}


class ParquetSource(PackSource):
    """The rows of parquet files: a column of images (bytes, or `bytes` and `path`), one of labels, one of texts.

    Arguments:
        paths: the files.
        columns: the columns of images, labels and texts; None is found by its name or left out.
        labels: whether to read labels.

    Raises:
        DiffxError: if pyarrow is not installed, a file is damaged, or there is no column of images.
    """

    def __init__(
        self,
        paths: list[Path],
        columns: tuple[str | None, str | None, str | None] = (None, None, None),
        labels: bool = True,
    ) -> None:
        self.paths = paths
        self._open: dict[int, Any] = {}
        self._lock = Lock()
        self._groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        rows, self._starts = [], []
        for k in range(len(paths)):
            metadata = self._file(k).metadata
            for group in range(metadata.num_row_groups):
                self._starts.append((k, group))
                rows.append(metadata.row_group(group).num_rows)
        self.rows = rows
        self.ends = np.cumsum(rows)
        schema = self._file(0).schema_arrow
        self.image, self.label, self.text = _columns(paths[0], schema.names, columns)
        self.label = self.label if labels else None
        super().__init__(f"'{paths[0].parent}'", _class_names(schema.metadata or {}, self.label))
        if not rows:
            raise DiffxError(f"{self.where} has no rows; give files with images")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_groups": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=Lock())

    def read(self, i: int) -> Sample:
        """One row; see `PackSource.read`."""
        place, within = self._place(i)
        k, group = self._starts[place]
        with self._lock:
            row = self._rows(k, group)[within]
        name = f"{self.paths[k]}, row {i - (int(self.ends[place - 1]) if place else 0)} of row group {group}"
        image = row[self.image]
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise DiffxError(f"'{name}' has no image bytes in its column '{self.image}'; embed the images, or drop it")
        label = None if self.label is None else row[self.label]
        if label is not None and not isinstance(label, int):
            raise DiffxError(f"'{name}' has the label {label!r:.40}, no whole number; set label_key, or classes=false")
        text = None if self.text is None else row[self.text]
        return Sample(name, image, label, {} if text is None else {"txt": str(text).encode()})

    def key(self, i: int) -> str:
        """Nothing: the names in a file of images need not be unique, and to read them all is to read all images."""
        return ""

    def identity(self) -> str:
        """The hash of the names and sizes of the files, and of the columns."""
        told = [(path.name, path.stat().st_size) for path in self.paths]
        text = repr((told, self.rows, self.image, self.label, self.text, self.class_names))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def blocks(self) -> list[int]:
        """The row groups: to read one row is to read its group."""
        return self.rows

    def _place(self, i: int) -> tuple[int, int]:
        place = int(np.searchsorted(self.ends, i, side="right"))
        return place, i - (int(self.ends[place - 1]) if place else 0)

    def _rows(self, k: int, group: int) -> list[dict[str, Any]]:
        if (k, group) not in self._groups:
            if len(self._groups) == _KEPT_GROUPS:
                self._groups.popitem(last=False)
            columns = [name for name in (self.image, self.label, self.text) if name is not None]
            try:
                found = self._file(k).read_row_group(group, columns=columns).to_pylist()
            except (OSError, ValueError) as error:  # pyarrow's errors are kinds of them
                raise DiffxError(f"'{self.paths[k]}' is damaged ({error}); fetch it again") from error
            self._groups[k, group] = found
        self._groups.move_to_end((k, group))
        return self._groups[k, group]

    def _file(self, k: int) -> Any:
        if k not in self._open:
            try:
                from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise DiffxError(
                    f"'{self.paths[k]}' is read by the package pyarrow ({error}); install it: pip install "
                    "'diffx[parquet]'"
                ) from error
            try:
                self._open[k] = ParquetFile(self.paths[k])
            except (OSError, ValueError) as error:
                raise DiffxError(f"'{self.paths[k]}' is missing, damaged or no parquet file ({error})") from error
        return self._open[k]


def parquet_splits(
    path: Path, columns: tuple[str | None, str | None, str | None], labels: bool
) -> dict[str, PackSource]:
    """The splits of a parquet file, or of a folder of them (`train-00000-of-00004.parquet`, also in a folder `data`).

    Arguments:
        path: the file or folder.
        columns: the columns of images, labels and texts; None is found by its name or left out.
        labels: whether to read labels.

    Raises:
        DiffxError: as `ParquetSource`.
    """
    if path.is_file():
        return {"": ParquetSource([path], columns, labels)}
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    found: dict[str, PackSource] = {}
    for split, names in _SPLITS.items():
        mine = [file for file in files if file.name.startswith(tuple(f"{name}-" for name in names))]
        if mine:
            found[split] = ParquetSource(mine, columns, labels)
    return found or {"": ParquetSource(files, columns, labels)}


def _columns(
    path: Path, found: list[str], given: tuple[str | None, str | None, str | None]
) -> tuple[str, str | None, str | None]:
    for name in given:
        if name is not None and name not in found:
            raise DiffxError(f"'{path}' has no column '{name}', only {', '.join(found)}; choose one of them")
    image, label, text = (
        name or next((n for n in usual if n in found), None)
        for name, usual in zip(given, (_IMAGES, _LABELS, _TEXTS), strict=True)
    )
    if image is None:
        raise DiffxError(f"'{path}' has no column {' or '.join(_IMAGES)}, only {', '.join(found)}; set image_key=NAME")
    return image, label, text


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` keeps for a column of classes."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return tuple(str(name) for name in features.get(label, {}).get("names", ()))
    except (ValueError, AttributeError):
        return ()
