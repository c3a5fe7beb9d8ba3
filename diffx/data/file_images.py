"""Images decoded from their files: all at once into memory, or when they are asked for."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffx.data.base import Batch, Images, TensorImages
from diffx.data.decode import check_header, read_image
from diffx.utils import DiffxError

_CHUNK = 256


class FileImages(Images):
    """A split whose files are decoded when they are asked for.

    Arguments:
        folder: the folder that the names start from.
        names: the files, N of them.
        labels: int64 `[N]`.
        channels: 1 for grey, 3 for RGB.
        image_size: height and width in pixels.
        upscale: whether smaller images are enlarged.
    """

    def __init__(
        self, folder: Path, names: list[str], labels: Tensor, channels: int, image_size: int, upscale: bool
    ) -> None:
        self.folder = folder
        # one array, not a million strings, whose reference counts would make each worker copy them
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = labels
        self.channels = channels
        self.image_size = image_size
        self.upscale = upscale

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Tensor) -> Batch:
        """Images by position; see `Images.get`."""
        images = (read_image(self._path(i), self.channels, self.image_size, self.upscale) for i in indices.tolist())
        return {"x": torch.from_numpy(np.stack(list(images))), "label": self.labels[indices]}

    def fingerprint(self) -> str:
        """The hash of names, sizes, times of change and labels, and of how the files are read."""
        digest = hashlib.blake2b(f"{self.channels} {self.image_size} {self.upscale}".encode(), digest_size=16)
        for i, label in enumerate(self.labels.tolist()):
            status = self._path(i).stat()
            digest.update(f"\n{os.fsdecode(self.names[i])} {status.st_size} {status.st_mtime_ns} {label}".encode())
        return digest.hexdigest()

    def decoded(self, description: str) -> TensorImages:
        """All images in memory.

        Arguments:
            description: what the progress bar says.

        Raises:
            DiffxError: if files cannot be read, naming the first and counting the others.
        """
        pixels = torch.empty(len(self), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        rows = pixels.numpy()

        def decode(i: int) -> None:
            rows[i] = read_image(self._path(i), self.channels, self.image_size, self.upscale)

        _for_each(decode, len(self), description)
        return TensorImages(pixels, self.labels)

    def verify(self, description: str) -> None:
        """Reads the headers of all files; arguments and errors as in `decoded`."""
        _for_each(lambda i: check_header(self._path(i), self.image_size, self.upscale), len(self), description)

    def _path(self, i: int) -> Path:
        return self.folder / os.fsdecode(self.names[i])


def _for_each(work: Callable[[int], None], count: int, description: str) -> None:
    """Calls `work` for 0..count-1 in threads, with a progress bar, and raises one error for all that failed."""

    def chunk(start: int) -> list[str]:
        return [message for i in range(start, min(start + _CHUNK, count)) if (message := _failure(work, i))]

    with ThreadPoolExecutor(min(_cores(), 16)) as pool:
        chunks = pool.map(chunk, range(0, count, _CHUNK))
        failures = [message for messages in _progress(chunks, description, count) for message in messages]
    if failures:
        others = f" (and {len(failures) - 1} more such files)" if failures[1:] else ""
        raise DiffxError(failures[0] + others)


def _failure(work: Callable[[int], None], i: int) -> str:
    try:
        work(i)
    except DiffxError as error:
        return str(error)
    return ""


def _progress(chunks: Iterable[list[str]], description: str, count: int) -> Iterable[list[str]]:
    console = Console(stderr=True)
    # one bar per machine, and none in log files
    quiet = not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0"
    total = (count + _CHUNK - 1) // _CHUNK
    return track(chunks, description, total=total, console=console, disable=quiet, transient=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
