"""What a tar shard holds and where, from its headers and labels: `x.tar` gets an index `x.tar.index.npz` beside it.

A member `folder/000123.jpg` belongs to the sample of key `folder/000123` as its part `jpg`: the key ends at the first
dot of the file name, extensions are lower case. Folders, links, names without an extension, names that start with a dot
and WebDataset's own `__…__` files are no parts. Nothing is ever unpacked.

An index is read again while the shard has the same size and time of change, or the same size and the same bytes in 16
places (copies lose their times). Where the shard's folder cannot be written, the index goes to `cache_folder()`.
"""

import hashlib
import os
import re
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from diffx.utils import DiffxError

SUFFIX = ".index.npz"
_VERSION = 1
_BLOCK = 512
_NONE = 2**32 - 1
_FILES, _PAX = (ord("0"), 0), ord("x")
_TELLING = re.compile(rb"path=|size=|GNU\.|charset=")
_MOST_EXTENSIONS = 64
_PROBES, _PROBE_BYTES = 16, 4096
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order of the tar.

    Arguments:
        path: the shard, as it was given.
        size: its bytes.
        mtime_ns: its time of change.
        probe: 32 hexadecimal digits, the hash of 16 places of it.
        complete: False if the end of the shard is missing; samples that are cut off are not in the index.
        extensions: the E kinds of parts, in the order of their first appearance, lower case, without the first dot.
        key_bytes: all keys in UTF-8, one behind the other, uint8.
        key_ends: where each ends, int64 `[n]`.
        offsets: where in the shard each part's bytes begin, int64 `[n, E]`; -1 where a sample has no such part.
        sizes: how many they are, int64 `[n, E]`; 0 where there are none.
        labels: the numbers in the parts `cls`, int64 `[n]`; None unless every sample has one that is a whole number.
    """

    path: str
    size: int
    mtime_ns: int
    probe: str
    complete: bool
    extensions: tuple[str, ...]
    key_bytes: np.ndarray
    key_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of samples n."""
        return len(self.key_ends)

    def key(self, i: int) -> str:
        """The key of sample i."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].tobytes().decode("utf-8", "replace")

    def keys(self) -> list[bytes]:
        """All keys, in UTF-8."""
        text, ends = self.key_bytes.tobytes(), self.key_ends.tolist()
        return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []

    def part(self, extension: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets, int64 `[n]` (-1 where there is none), and sizes, int64 `[n]`, of one kind of part."""
        if extension not in self.extensions:
            return np.full(len(self), -1, np.int64), np.zeros(len(self), np.int64)
        column = self.extensions.index(extension)
        return self.offsets[:, column], self.sizes[:, column]


def index_shard(path: str | Path) -> ShardIndex:
    """Reads the headers and labels of a shard. Writes nothing: see `save_index`, or `open_index` for all at once.

    Raises:
        DiffxError: if the shard is missing, empty, compressed, no tar or damaged inside, holds two parts of one name or
            a name that leads out of its folder. A missing end is no error; see `ShardIndex.complete`.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            _check_kind(path, file, status.st_size)
            table = _Samples(path)
            complete = True
            for name, offset, size in _members(path, file, status.st_size):
                if offset + size > status.st_size:
                    complete = False
                    table.drop(name)
                else:
                    table.add(name, offset, size)
            arrays = table.arrays(complete)
            labels = _labels(file, *arrays)
            probe = _probe(file, status.st_size)
    except OSError as error:
        raise _unreadable(path, error) from error
    return ShardIndex(str(path), status.st_size, status.st_mtime_ns, probe, complete, *arrays, labels)


def open_index(path: str | Path) -> ShardIndex:
    """The saved index if it is valid; otherwise the shard is indexed and the index saved, where that can be done.

    Raises:
        DiffxError: as `index_shard`.
    """
    found = load_index(path)
    if found is None:
        found = index_shard(path)
        save_index(found)
    return found


def load_index(path: str | Path) -> ShardIndex | None:
    """The saved index of a shard, None if there is none or the shard has changed since.

    Raises:
        DiffxError: if the shard is missing.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    for file in (beside(path), in_cache(path)):
        found = read_index(file, str(path))
        if found is None or found.size != status.st_size:
            continue
        if found.mtime_ns == status.st_mtime_ns:
            return found
        with path.open("rb", buffering=0) as shard:
            if _probe(shard, status.st_size) == found.probe:
                return found
    return None


def read_index(file: Path, path: str) -> ShardIndex | None:
    """An index file as it is, whatever has become of its shard; None if it is absent, damaged or of another version.

    Arguments:
        file: the index file.
        path: what the shard is called in `ShardIndex.path`.
    """
    try:
        with np.load(file, allow_pickle=False) as saved:
            version, size, mtime_ns, complete = saved["numbers"].tolist()
            if version != _VERSION:
                return None
            blocks = saved["blocks"]
            offsets = np.where(blocks == _NONE, -1, blocks.astype(np.int64) * _BLOCK)
            probe, *extensions = saved["text"].tobytes().decode().split("\n")
            return ShardIndex(
                path,
                size,
                mtime_ns,
                probe,
                bool(complete),
                tuple(extensions),
                saved["keys"],
                saved["key_ends"].astype(np.int64),
                offsets,
                saved["sizes"].astype(np.int64),
                saved.get("labels"),
            )
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, zipfile.BadZipFile):
        return None


def save_index(index: ShardIndex, file: Path | None = None) -> Path | None:
    """Writes an index: to `file`, or beside the shard, or, if that cannot be done, into the cache.

    Returns:
        Where it is, None (and a warning) if nothing could be written.
    """
    for target in [file] if file else [beside(index.path), in_cache(index.path)]:
        if _written(index, target):
            return target
    warnings.warn(f"the index of '{index.path}' cannot be saved; it is made anew each time", stacklevel=2)
    return None


def _written(index: ShardIndex, target: Path) -> bool:
    """Writes an index whole or not at all. Not waiting for the disk: one that a crash breaks fails its check sums."""
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent)
        with open(handle, "wb") as stream:  # noqa: PTH123 (a descriptor)
            np.savez(stream, allow_pickle=False, **_plain(index))
        os.chmod(temporary, 0o644)  # noqa: PTH101
        Path(temporary).replace(target)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def beside(path: str | Path) -> Path:
    """Where the index of a shard is looked for first."""
    return Path(f"{path}{SUFFIX}")


def in_cache(path: str | Path) -> Path:
    """Where the index of a shard is looked for where its folder cannot be written."""
    digest = hashlib.blake2b(os.fsencode(Path(path).absolute()), digest_size=16).hexdigest()
    return cache_folder() / "indexes" / f"{digest}{SUFFIX}"


def cache_folder() -> Path:
    """`$DIFFX_CACHE`, or else `$XDG_CACHE_HOME/diffx` (or `~/.cache/diffx`), and there the folder `shards`."""
    own = os.environ.get("DIFFX_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx"
    return base.expanduser() / "shards"


def _plain(index: ShardIndex) -> dict[str, np.ndarray]:
    """Compact arrays: data in a tar begin at multiples of 512 bytes."""
    text = "\n".join((index.probe, *index.extensions)).encode()
    small = index.sizes.max(initial=0) < 2**32
    labels = {} if index.labels is None else {"labels": index.labels}
    return {
        **labels,
        "numbers": np.array([_VERSION, index.size, index.mtime_ns, index.complete], np.int64),
        "text": np.frombuffer(text, np.uint8),
        "keys": index.key_bytes,
        "key_ends": index.key_ends.astype(np.uint32),
        "blocks": np.where(index.offsets < 0, _NONE, index.offsets // _BLOCK).astype(np.uint32),
        "sizes": index.sizes.astype(np.uint32 if small else np.uint64),
    }


# ---- from members to samples ----


class _Samples:
    """Collects members into samples; the parts of a sample need not be neighbours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, int] = {}
        self.columns: dict[str, int] = {}
        self.cells: dict[tuple[int, int], tuple[int, int]] = {}
        self.dropped: set[str] = set()

    def add(self, name: str, offset: int, size: int) -> None:
        """Files one member."""
        if split := self._split(name):
            key, extension = split
            cell = (self.rows.setdefault(key, len(self.rows)), self._column(extension, name))
            if cell in self.cells:
                raise DiffxError(
                    f"'{self.path}' holds '{name}' twice, so that it is undefined which belongs to the sample '{key}'; "
                    "write the shard anew"
                )
            self.cells[cell] = offset, size

    def drop(self, name: str) -> None:
        """Notes that the sample of this member is cut off."""
        if split := self._split(name):
            self.dropped.add(split[0])

    def arrays(self, complete: bool) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Extensions, key bytes, key ends, offsets and sizes of the samples that are whole."""
        if not self.rows and complete:
            raise DiffxError(f"'{self.path}' holds no samples, that is no files KEY.EXTENSION; remove it")
        shape = (len(self.rows), len(self.columns))
        offsets, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        if self.cells:
            cells = np.array(list(self.cells), np.int64).T
            offsets[cells[0], cells[1]], sizes[cells[0], cells[1]] = np.array(list(self.cells.values()), np.int64).T
        keys = list(self.rows)
        if not complete and len(keys) > 1 and ((offsets[-2] >= 0) > (offsets[-1] >= 0)).any():
            self.dropped.add(keys[-1])  # what the sample before it has is missing
        if self.dropped:
            kept = [i for i, key in enumerate(keys) if key not in self.dropped]
            keys, offsets, sizes = [keys[i] for i in kept], offsets[kept], sizes[kept]
        texts = [key.encode("utf-8", "surrogateescape") for key in keys]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        return tuple(self.columns), np.frombuffer(b"".join(texts), np.uint8), ends, offsets, sizes

    def _split(self, name: str) -> tuple[str, str] | None:
        """Key and extension; None for what is no part of a sample."""
        if name.startswith("./"):
            name = name[2:]
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise DiffxError(f"'{self.path}' holds '{name}', a name that leads out of its folder; write the shard anew")
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not stem or not dot or not extension or (file.startswith("__") and stem.endswith("__")):
            return None
        return folder + slash + stem, extension.lower()

    def _column(self, extension: str, name: str) -> int:
        if extension not in self.columns and len(self.columns) == _MOST_EXTENSIONS:
            raise DiffxError(
                f"'{self.path}' has more than {_MOST_EXTENSIONS} extensions, such as that of '{name}'; the key of a "
                "sample ends at the first dot of its file names, so write the shard anew with keys without dots"
            )
        return self.columns.setdefault(extension, len(self.columns))


# ---- tar headers ----


def _members(path: Path, file: IO[bytes], end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of all files; where the end of the tar is missing, the last reaches beyond the file's."""
    offset, tar = 0, None
    while offset + _BLOCK <= end:
        blocks = os.pread(file.fileno(), 3 * _BLOCK, offset)
        header, begin = _header(blocks[:_BLOCK]), offset
        if header is not None and header[0] == _PAX and _idle(blocks[_BLOCK:], header[2]):
            # most writers give every member a time of change of its own
            begin = offset + 2 * _BLOCK
            header = _header(blocks[2 * _BLOCK :])
        if header is not None and header[0] in _FILES:
            _, name, size = header
            yield name, begin + _BLOCK, size
            offset = begin + _BLOCK + _padded(size)
            continue
        block = blocks[:_BLOCK]
        if not any(block):
            return
        # long names, folders, links: rare enough for the standard library
        try:
            tar = tar or tarfile.TarFile(fileobj=file, mode="r")
            file.seek(offset)
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.TarError as error:
            if _reaches_beyond(block, offset, end):
                break
            raise DiffxError(
                f"'{path}' is damaged or no tar file ({error}, at byte {offset:,}); fetch or write it anew"
            ) from error
        if member.issparse():
            raise DiffxError(f"'{path}' holds '{member.name}' as a sparse file; write the shard anew without --sparse")
        if member.isreg():
            yield member.name, member.offset_data, member.size
        offset = tar.offset
    # without the blocks of zeros that end a tar, something is cut off
    yield "", end, _BLOCK


def _header(block: bytes) -> tuple[int, str, int] | None:
    """Type, name and size of a member, None for what is unusual: eight times as fast as the standard library."""
    if len(block) < _BLOCK or not block[0] or block[124] & 0x80:
        return None
    try:
        size, total = int(block[124:136].split(b"\0", 1)[0] or b"0", 8), int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    # the sum of all bytes, those of the sum itself counted as blanks; the lower half of adler32 is 1 more, mod 65,521
    if (total - 256 + sum(block[148:156]) + 1) % 65521 != zlib.adler32(block) & 0xFFFF:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    # the oldest tars know folders by their names only
    return None if name.endswith(b"/") else (block[156], name.decode("utf-8", "surrogateescape"), size)


def _idle(records: bytes, size: int) -> bool:
    """Whether a pax header of one block says nothing about name, size or kind of the member that follows."""
    return 0 < size <= _BLOCK and not _TELLING.search(records, 0, size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _reaches_beyond(block: bytes, offset: int, end: int) -> bool:
    """Whether a header is followed by data that the end of the file cuts off, as a long name may be."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size + offset + 2 * _BLOCK > end
    except tarfile.TarError:
        return False


def _check_kind(path: Path, file: IO[bytes], size: int) -> None:
    head = os.pread(file.fileno(), 6, 0)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DiffxError(
                f"'{path}' is compressed with {name}, so that samples can only be read in sequence; unpack it to a "
                "plain .tar (images are compressed already)"
            )
    if path.suffix.lower() != ".tar":
        raise DiffxError(f"'{path}' is no .tar file; set data.shards to the tar shards alone")
    if size == 0:
        raise DiffxError(f"'{path}' is empty; fetch or write it anew, or remove it")


def _labels(
    file: IO[bytes],
    extensions: tuple[str, ...],
    key_bytes: np.ndarray,
    key_ends: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray | None:
    if "cls" not in extensions:
        return None
    column = extensions.index("cls")
    places = zip(offsets[:, column].tolist(), sizes[:, column].tolist(), strict=True)
    try:
        # an absent one has size 0, and nothing is no number
        return np.array([int(os.pread(file.fileno(), min(size, 20), offset)) for offset, size in places], np.int64)
    except (ValueError, OverflowError, OSError):
        return None


def _probe(file: IO[bytes], size: int) -> str:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for k in range(_PROBES):
        digest.update(os.pread(file.fileno(), _PROBE_BYTES, k * max(size - _PROBE_BYTES, 0) // (_PROBES - 1)))
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> DiffxError:
    if isinstance(error, FileNotFoundError):
        return DiffxError(f"there is no shard '{path}'; correct data.shards, or fetch it")
    return DiffxError(f"the shard '{path}' cannot be read ({error.strerror or error}); check it and its permissions")
