"""Existing shards as something to be packed."""

import hashlib
import io
import os
from pathlib import Path
from threading import Lock

import numpy as np

from diffx.data.pack.manifest import Manifest
from diffx.data.pack.source import PackSource, Sample
from diffx.data.shards.fields import as_label
from diffx.data.shards.index import ShardIndex, open_index
from diffx.utils import DiffxError

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "npy")
"""The parts that can be a sample's image, the first that there is being it."""

_MOST_OPEN = 256


class ShardSource(PackSource):
    """The samples of tar shards, in their order.

    Arguments:
        paths: the shards.
        labels: whether to read labels, the part `cls`.

    Raises:
        DiffxError: if a shard is missing, damaged, cut off, or has no images.
    """

    def __init__(self, paths: list[str], labels: bool = True) -> None:
        folder = Path(paths[0]).parent
        manifest = Manifest.beside(folder)
        super().__init__(f"'{folder}'", manifest.class_names if manifest is not None and labels else ())
        self.labels = labels
        self.indexes = [_whole(path) for path in paths]
        self.ends = np.cumsum([len(index) for index in self.indexes])
        self._files: dict[str, int] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=Lock())

    def parts(self, i: int) -> tuple[str, dict[str, bytes]]:
        """The name of a sample for messages, and the bytes of its parts by extension."""
        shard, row = self._place(i)
        index = self.indexes[shard]
        held = np.flatnonzero(index.offsets[row] >= 0)
        parts = {
            index.extensions[k]: self._pread(index.path, int(index.offsets[row, k]), int(index.sizes[row, k]))
            for k in held.tolist()
        }
        return f"{index.path}: {index.key(row)}", parts

    def read(self, i: int) -> Sample:
        """One sample; see `PackSource.read`."""
        name, parts = self.parts(i)
        kind = next((kind for kind in IMAGE_PARTS if kind in parts), None)
        if kind is None:
            raise DiffxError(f"'{name}' has no image, only {', '.join(parts)}; remove it, or write the shard anew")
        image, label = parts.pop(kind), parts.pop("cls", None)
        extras = {extension: data for extension, data in parts.items() if extension not in IMAGE_PARTS}
        return Sample(
            name,
            _pixels(array_of(image, name), name) if kind == "npy" else image,
            as_label(label.strip(), f"{name}.cls") if label is not None and self.labels else None,
            extras,
        )

    def key(self, i: int) -> str:
        """The key that the sample has."""
        shard, row = self._place(i)
        return self.indexes[shard].key(row)

    def identity(self) -> str:
        """The hash of the shards' sizes, of bytes in 16 places of each, and of all keys."""
        digest = hashlib.blake2b(digest_size=16)
        for index in self.indexes:
            digest.update(f"{index.size} {index.probe}".encode() + index.key_bytes.tobytes())
        return digest.hexdigest()

    def blocks(self) -> list[int]:
        """None: the index says where each sample is."""
        return []

    def _place(self, i: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return shard, i - (int(self.ends[shard - 1]) if shard else 0)

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        try:
            # of several threads none may close what another reads
            with self._lock:
                if path not in self._files:
                    if len(self._files) >= _MOST_OPEN:
                        os.close(self._files.pop(next(iter(self._files))))
                    self._files[path] = os.open(path, os.O_RDONLY)
                data = os.pread(self._files[path], size, offset)
        except OSError as error:
            raise DiffxError(f"the shard '{path}' cannot be read ({error.strerror}); check it") from error
        if len(data) < size:
            raise DiffxError(f"the shard '{path}' has become shorter while it was read; run the command again")
        return data


def array_of(data: bytes, name: str) -> np.ndarray:
    """The array in the bytes of an `npy` part.

    Raises:
        DiffxError: if it is none, naming it.
    """
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DiffxError(f"'{name}' holds no array ({error}); write the shard anew") from error


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3:
        raise DiffxError(
            f"'{name}' holds {array.dtype} {list(array.shape)}, and images are uint8 [C, H, W]; give shards of images"
        )
    return array.transpose(1, 2, 0)


def _whole(path: str) -> ShardIndex:
    index = open_index(path)
    if not index.complete:
        raise DiffxError(f"the end of the shard '{path}' is missing; fetch or write it anew")
    return index
