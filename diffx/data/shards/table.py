"""All samples of all shards in one table, mapped from a file that the processes of a machine share.

Sample number i of the training data is a row: where its image is, its label, its caption. With it a run of any size
starts at any sample at once, and reads nothing but the images it trains on.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffx.data.shards.index import ShardIndex, cache_folder, open_index
from diffx.data.shards.patterns import is_remote
from diffx.data.shards.remote import Copies, locked
from diffx.data.shards.rows import Reading, Rows, rows_of
from diffx.utils import DiffxError, atomic_path

_VERSION = "1"
_SHARDS_PER_WORKER = 32


@dataclass(frozen=True)
class Member:
    """A shard of a data set.

    Arguments:
        name: path or URL.
        source: which source of a mixture it belongs to.
        held_out: whether all of it is held out.
    """

    name: str
    source: int = 0
    held_out: bool = False


class Table:
    """The rows of all shards, N of them.

    Arguments:
        members: the S shards.
        identities: their bytes and times of change (0 for remote ones), int64 `[S, 2]`.
        bounds: row number where each group of each shard begins, and where the last ends, int64 `[S, G + 1]`.
        columns: as in `Rows`, each `[N]`.
        left_out: why samples are no rows, and how many.
        file: where the table is saved; None if it is not.
    """

    def __init__(
        self,
        members: Sequence[Member],
        identities: Tensor,
        bounds: Tensor,
        columns: dict[str, Tensor],
        left_out: dict[str, int],
        file: Path | None = None,
    ) -> None:
        self.members = list(members)
        self.identities = identities
        self.bounds = bounds
        self.columns = columns
        self.left_out = left_out
        self.file = file
        self.raw = bool(columns["raw"].all())
        self._starts = bounds[:, 0].contiguous()

    def __len__(self) -> int:
        """The number of rows N."""
        return len(self.columns["offset"])

    def __reduce__(self) -> tuple:
        # a worker that is not forked maps the file again
        if self.file is not None:
            return load_table, (self.file,)
        return Table, (self.members, self.identities, self.bounds, self.columns, self.left_out)

    def shard_of(self, rows: Tensor) -> Tensor:
        """The shard that each row is in, int64 `[b]`."""
        return torch.searchsorted(self._starts, rows, right=True) - 1

    def group(self, group: int | slice, source: int | None = None) -> "Selection":
        """The rows of one group or of several in a row, of all shards or of those of one source."""
        first, last = (group, group + 1) if isinstance(group, int) else (group.start, group.stop)
        counts = self.bounds[:, last] - self.bounds[:, first]
        if source is not None:
            counts = counts * torch.tensor([member.source == source for member in self.members])
        return Selection(self.bounds[:, first].contiguous(), counts)

    def changed(self) -> str | None:
        """The name of a local shard that has changed since the table was made; None if none has."""
        with ThreadPoolExecutor(16) as pool:
            now = pool.map(_identity, self.members)
            for member, found, known in zip(self.members, now, self.identities.tolist(), strict=True):
                if found is not None and list(found) != known:
                    return member.name
        return None


class Selection:
    """Some rows of a table, in a row within each shard, by their positions 0..M-1.

    Arguments:
        firsts: the first of them in each shard, int64 `[S]`.
        counts: how many follow from there, int64 `[S]`.
    """

    def __init__(self, firsts: Tensor, counts: Tensor) -> None:
        self.firsts = firsts
        self.counts = counts
        self._ends = counts.cumsum(0)

    def __len__(self) -> int:
        """Their number M."""
        return int(self._ends[-1])

    def rows(self, positions: Tensor) -> Tensor:
        """The rows at some positions, both int64 `[b]`."""
        shard = torch.searchsorted(self._ends, positions, right=True)
        return self.firsts[shard] + positions - (self._ends - self.counts)[shard]

    def after(self, row: int, shard: int) -> int:
        """The row at the next position; the first one comes after the last."""
        position = int(self._ends[shard] - self.counts[shard]) + row - int(self.firsts[shard])
        return int(self.rows(torch.tensor([(position + 1) % len(self)])))


def open_table(members: Sequence[Member], reading: Reading, copies: Copies, count_ahead: bool) -> Table:
    """The saved table if it is valid; otherwise it is made, which reads or makes the index of every shard, and saved.

    Arguments:
        members: the shards.
        reading: which samples count, and what is read of them.
        copies: of remote shards.
        count_ahead: whether remote shards may be fetched to be indexed.

    Raises:
        DiffxError: what is wrong with the shards.
    """
    file = cache_folder() / "tables" / f"{_digest(members, reading)}.safetensors"
    found = _valid(file)
    if found is not None:
        return found
    if not _writable(file.parent):
        return build_table(members, reading, copies, count_ahead)
    with locked(file):
        # another process may have made it meanwhile
        found = _valid(file)
        if found is None:
            save_table(build_table(members, reading, copies, count_ahead), file)
            found = load_table(file)
        return found


def build_table(members: Sequence[Member], reading: Reading, copies: Copies, count_ahead: bool) -> Table:
    """Makes a table of the shards; arguments and errors as in `open_table`."""
    scanned = list(_scanned(_Scan(members, reading, copies, count_ahead)))
    parts, identities = [rows for rows, _ in scanned], [identity for _, identity in scanned]
    left_out: Counter[str] = Counter()
    for part in parts:
        left_out.update(part.left_out)
    columns = {
        name: torch.from_numpy(np.concatenate([part.columns[name] for part in parts])) for name in parts[0].columns
    }
    sizes = torch.from_numpy(np.stack([part.sizes for part in parts]))
    ends = sizes.flatten().cumsum(0).reshape(sizes.shape)
    bounds = torch.cat([ends[:, :1] - sizes[:, :1], ends], dim=1)
    return Table(members, torch.tensor(identities, dtype=torch.int64), bounds, columns, dict(left_out))


def save_table(table: Table, file: Path) -> None:
    """Writes a table.

    Raises:
        DiffxError: if it cannot be written.
    """
    tensors = {**table.columns, "identities": table.identities, "bounds": table.bounds}
    members = [asdict(member) for member in table.members]
    texts = {"version": _VERSION, "members": json.dumps(members), "left_out": json.dumps(table.left_out)}
    with atomic_path(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, texts)


def load_table(file: Path) -> Table:
    """Maps a saved table.

    Raises:
        OSError, SafetensorError, ValueError: if there is none, or it is damaged or of another version.
    """
    with safe_open(file, framework="pt") as saved:
        texts = saved.metadata()
        if texts["version"] != _VERSION:
            raise ValueError(f"'{file}' is of version {texts['version']}")
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (no mapping)
    members = [Member(**member) for member in json.loads(texts["members"])]
    identities, bounds = tensors.pop("identities"), tensors.pop("bounds")
    return Table(members, identities, bounds, tensors, json.loads(texts["left_out"]), file)


def _valid(file: Path) -> Table | None:
    try:
        found = load_table(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return None if found.changed() else found


def _digest(members: Sequence[Member], reading: Reading) -> str:
    absolute = [[m.name if is_remote(m.name) else str(Path(m.name).absolute()), m.source, m.held_out] for m in members]
    text = json.dumps([_VERSION, absolute, asdict(reading)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _identity(member: Member) -> tuple[int, int] | None:
    """Size and time of change of a local shard; None for a remote one."""
    if is_remote(member.name):
        return None
    try:
        status = os.stat(member.name)  # noqa: PTH116 (ten thousand of them)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


# ---- reading the shards, in several processes where there are many ----


Scanned = tuple[Rows, tuple[int, int]] | DiffxError


class _Scan(Dataset[Scanned]):
    def __init__(self, members: Sequence[Member], reading: Reading, copies: Copies, count_ahead: bool) -> None:
        self.members = list(members)
        self.reading = reading
        self.copies = copies
        self.count_ahead = count_ahead

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Scanned:
        member = self.members[i]
        try:
            index, file = self._index(member.name)
            identity = _identity(member) or (index.size, 0)
            return rows_of(index, file, self.reading, member.held_out), identity
        except DiffxError as error:
            return error

    def _index(self, name: str) -> tuple[ShardIndex, Callable[[], Path]]:
        if not is_remote(name):
            return open_index(name), lambda: Path(name)
        index = self.copies.index(name, self.count_ahead)

        def file() -> Path:
            if not self.count_ahead:
                raise DiffxError(
                    f"labels, conditions or arrays of '{name}' must be read before training, and it is not on this "
                    "machine; set data.count_ahead=true to fetch every shard once now"
                )
            return self.copies.fetch(name, index.size)

        return index, file


def _scanned(scan: _Scan) -> Iterable[tuple[Rows, tuple[int, int]]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, 16, len(scan) // _SHARDS_PER_WORKER)
    loader = DataLoader(
        scan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
        prefetch_factor=None,
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0"
    for found in track(loader, "reading the shards", total=len(scan), console=console, disable=quiet, transient=True):
        if isinstance(found, DiffxError):
            raise found
        yield found


def _as_it_is(value: Any) -> Any:
    return value
