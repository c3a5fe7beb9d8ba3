"""Reading of idx files, the format in which MNIST and its kin are published (Y. LeCun, *The MNIST database*)."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffx.utils import DiffxError

_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> np.ndarray:
    """Reads a whole idx file of unsigned bytes.

    Arguments:
        path: the file; gzip if its name ends in `.gz`.

    Returns:
        A writable uint8 array of the shape that the header states.

    Raises:
        DiffxError: if the file is missing, is no such file, or is longer or shorter than its header states.
    """
    return _read(path, header_only=False)[1]


def read_idx_shape(path: Path) -> tuple[int, ...]:
    """Reads the header of an idx file only, and returns the shape it states; errors as in `read_idx`."""
    return _read(path, header_only=True)[0]


def _read(path: Path, header_only: bool) -> tuple[tuple[int, ...], np.ndarray]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _read_header(file)
            content = b"" if header_only else file.read()
    except (OSError, EOFError, zlib.error, ValueError, struct.error) as error:
        raise DiffxError(f"'{path}' is missing, truncated or no idx file ({error}); fetch it again") from error
    if not header_only and len(content) != math.prod(shape):
        raise DiffxError(
            f"'{path}' holds {len(content)} bytes where its header states {math.prod(shape)}; fetch it again"
        )
    return shape, np.frombuffer(bytearray(content), np.uint8).reshape(-1 if header_only else shape)


def _read_header(file: BinaryIO | gzip.GzipFile) -> tuple[int, ...]:
    zeros, kind, axes = struct.unpack(">HBB", file.read(4))
    if zeros or kind != _UNSIGNED_BYTE:
        raise ValueError("it does not start like an idx file of bytes")
    return struct.unpack(f">{axes}I", file.read(4 * axes))
