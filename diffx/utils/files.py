"""Files that are either whole or absent."""

import errno
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffx.errors import DiffxError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed to it when the block ends well, removed when it does not.

    A killed process or a full disk therefore never leaves a half-written file under the final name.

    Raises:
        DiffxError: if the file cannot be written (full disk, no permission), naming the file.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix stays last: numpy and PIL choose the format by it
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise DiffxError(
            f"cannot write '{path}': {error.strerror or error}; free some space or choose a writable folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EROFS, errno.EREMOTEIO}
"""What a file system on the network says while it is away."""


def patiently(write: Callable[[], None], seconds: float = 180.0, pause: float = 5.0) -> None:
    """Writes, and tries again for a while if the file system is away; a full disk is no reason to wait.

    Arguments:
        write: does it; may be called several times.
        seconds: how long to try.
        pause: seconds between two tries.

    Raises:
        DiffxError: what the last try said.
        OSError: what the last try said.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return write()
        except (OSError, DiffxError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in PASSING or time.monotonic() + pause > deadline:
                raise
            warnings.warn(f"{error}; trying again for {deadline - time.monotonic():.0f} s", stacklevel=2)
            time.sleep(pause)


def _sync(folder: Path) -> None:
    """Makes a renamed file survive a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
