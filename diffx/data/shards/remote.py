"""Remote shards, copied to this machine once and then read like local ones."""

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffx.data.shards.index import SUFFIX, ShardIndex, cache_folder, index_shard, read_index, save_index
from diffx.utils import DiffxError, atomic_path

_CHUNK = 1 << 20
_ATTEMPTS = 3
_TAR_OF_PIPE = re.compile(r"(\S+\.tar)(?=\s|$)")


class Copies:
    """The copies of remote shards below `cache_folder()`, at most so many bytes of them.

    Every process of a machine may use them at once: each shard is fetched by one of them, and appears whole or not at
    all. What was used longest ago goes first; a shard that a process has open can still be read by it.

    Arguments:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._wanted: list[tuple[str, int]] = []
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_wanted": [], "_thread": None}

    def fetch(self, url: str, size: int | None = None) -> Path:
        """The copy of a shard, fetched if it is not there.

        Arguments:
            url: what WebDataset's `gopen` opens.
            size: the bytes it must have, as its index says.

        Raises:
            DiffxError: if it cannot be fetched, or is not the shard that was indexed.
        """
        path = self._path(url)
        if not _touch(path):
            with locked(path):
                if not path.exists():
                    _download(url, path, size)
                    self._make_room(path)
        if size is not None and path.stat().st_size != size:
            raise DiffxError(
                f"'{url}' has {path.stat().st_size:,} bytes, and {size:,} when it was indexed; remove '{path}' and "
                f"'{_index_path(url)}', and index it anew"
            )
        return path

    def ahead(self, shards: Sequence[tuple[str, int]]) -> None:
        """Fetches shards in the background, in this order, leaving out what other processes are fetching.

        Arguments:
            shards: URLs and sizes.
        """
        self._wanted = list(shards)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._thread.start()

    def index(self, url: str, count_ahead: bool) -> ShardIndex:
        """The index of a remote shard: one kept here, the file `URL.index.npz` beside it, or made from a copy.

        Arguments:
            url: the shard.
            count_ahead: whether to fetch the whole shard where there is no index.

        Raises:
            DiffxError: if there is none, and the shard may not or cannot be fetched.
        """
        file = _index_path(url)
        found = read_index(file, url)
        if found is None and _try_download(_index_url(url), file):
            found = read_index(file, url)
        if found is not None:
            return found
        if not count_ahead:
            raise DiffxError(
                f"'{url}' has no index '{_index_url(url)}' beside it, so that nobody knows how many samples it has; "
                "put the index of every shard there, or set data.count_ahead=true to fetch every shard once now"
            )
        found = index_shard(self.fetch(url))
        found = ShardIndex(**{**vars(found), "path": url})
        save_index(found, file)
        return found

    def _fetch_wanted(self) -> None:
        while self._wanted:
            url, size = self._wanted.pop(0)
            path = self._path(url)
            try:
                if not _touch(path):
                    with locked(path, blocking=False):
                        if not path.exists():
                            _download(url, path, size)
                            self._make_room(path)
            except (DiffxError, Timeout, OSError):
                continue  # whoever needs it will say so

    def _make_room(self, newest: Path) -> None:
        with locked(newest.parent / "all"):
            files = [(file.stat().st_mtime_ns, file.stat().st_size, file) for file in newest.parent.glob("*.tar")]
            total = sum(size for _, size, _ in files)
            for _, size, file in sorted(files):
                if total > self.limit and file != newest:
                    file.unlink(missing_ok=True)
                    total -= size

    def _path(self, url: str) -> Path:
        return cache_folder() / "fetched" / f"{_digest(url)}.tar"


def _download(url: str, path: Path, size: int | None) -> None:
    """Fetches a file.

    Raises:
        DiffxError: if that fails several times, or what comes has another size.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with atomic_path(path) as temporary:
                _copy(url, temporary)
                found = temporary.stat().st_size
                if found == 0 or size not in (None, found):
                    raise DiffxError(
                        f"'{url}' came with {found:,} bytes{f' instead of {size:,}' if size else ''}; check the "
                        "shard, and index it anew if it was replaced"
                    )
            return
        except DiffxError:
            if attempt == _ATTEMPTS - 1:
                raise


def _copy(url: str, target: Path) -> None:
    from webdataset.gopen import gopen

    def fetched(action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except ValueError as error:
            raise DiffxError(
                f"'{url}' is of a kind that cannot be fetched ({error}); name a command that prints it, as in "
                '"pipe:aws s3 cp s3://BUCKET/x.tar -"'
            ) from error
        except Exception as error:  # each kind of connection has its own
            raise DiffxError(f"'{url}' cannot be fetched ({error}); check the address and the connection") from error

    stream = fetched(gopen, url, "rb")
    try:
        with target.open("wb") as file:
            while chunk := fetched(stream.read, _CHUNK):
                file.write(chunk)
    finally:
        fetched(stream.close)


def _try_download(url: str, path: Path) -> bool:
    try:
        with atomic_path(path) as temporary:
            _copy(url, temporary)
    except DiffxError:
        return False
    return True


def _index_url(url: str) -> str:
    if url.startswith("pipe:"):
        return _TAR_OF_PIPE.sub(rf"\1{SUFFIX}", url, count=1)
    address, mark, query = url.partition("?")
    return address + SUFFIX + mark + query


def _index_path(url: str) -> Path:
    return cache_folder() / "indexes" / f"{_digest(url)}{SUFFIX}"


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _touch(path: Path) -> bool:
    """Whether the file is there; its time of change then says that it is in use."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def locked(path: Path, blocking: bool = True) -> Iterator[None]:
    """Work on a file of the cache that one process of all does at a time.

    Raises:
        DiffxError: if the cache cannot be written.
        Timeout: if another process is at it and `blocking` is false.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), blocking=blocking):
            yield
    except PermissionError as error:
        raise DiffxError(
            f"cannot write '{path.parent}' ({error}); set DIFFX_CACHE to a folder that can be written"
        ) from error
