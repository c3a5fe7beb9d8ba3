"""Shards that are whole or absent, and a command that can be given again."""

import fcntl
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from diffx.data.pack.manifest import MANIFEST, Contents, Manifest, Shard
from diffx.data.shards.index import beside, index_shard, save_index
from diffx.utils import DiffxError, atomic_path, write_text

Member = tuple[str, bytes]
"""A file in a tar: its name and bytes."""

_STAGING = "unfinished"
_PLAN = "plan.json"


class Staging:
    """The shards of a folder while some are missing.

    They lie in `DEST/unfinished/` with what is known of each. When all are there they are moved up, and the manifest is
    written last. So a folder with a manifest is complete, and before that none of its shards can be taken for all.

    Arguments:
        dest: the folder.
        names: the file names of all shards.
        plan: what the shards are made of and how, plain values: the same plan makes the same bytes.
    """

    def __init__(self, dest: Path, names: list[str], plan: dict[str, Any]) -> None:
        self.dest = dest
        self.folder = dest / _STAGING
        self.names = names
        self.plan = json.loads(json.dumps(plan))

    def begin(self) -> bool:
        """Claims the folder; returns whether it is finished already.

        Raises:
            DiffxError: if it holds something else, or shards of another plan.
        """
        file = self.folder / _PLAN
        if (self.dest / MANIFEST).is_file():
            manifest = Manifest.load(self.dest)
            self._compare({"samples": manifest.source, "settings": manifest.settings})
            return True
        if file.is_file():
            self._compare(json.loads(file.read_text(encoding="utf-8")))
            return False
        # killed before it had written its plan, diffx leaves an empty folder
        if self.dest.exists() and (not self.dest.is_dir() or any(path != self.folder for path in self.dest.iterdir())):
            raise DiffxError(
                f"'{self.dest}' exists and is no folder of shards begun by diffx; choose a new or empty one"
            )
        write_text(file, json.dumps(self.plan, indent=1, ensure_ascii=False) + "\n")
        return False

    def _compare(self, other: dict[str, Any]) -> None:
        for part, mine in self.plan.items():
            theirs = other.get(part, {})
            key = next((key for key in mine if mine[key] != theirs.get(key)), None)
            if key is not None:
                what = f"{key}={_shown(theirs.get(key))}, not {_shown(mine[key])}"
                raise DiffxError(
                    f"'{self.dest}' is of other {part} ({what}); give the same command again, choose another folder, "
                    "or delete this one"
                )

    @contextmanager
    def lock(self, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        """Keeps a second process from doing the same work at the same time; a killed process leaves no lock.

        Raises:
            DiffxError: if another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".lock-{rank}-of-{world_size}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DiffxError(
                    f"another process is writing to '{self.dest}'; wait for it, or stop it and run this again"
                ) from error
            except OSError:  # a file system without locks: then it is the user's care
                pass
            yield

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [i for i, name in enumerate(self.names) if not self._record(name).is_file()]

    def write(self, i: int, members: Iterable[Member], contents: Contents) -> None:
        """Writes one shard and what is known of it.

        Arguments:
            i: its number.
            members: its files, made while it is written.
            contents: counted by who makes the members; read when they are all made.

        Raises:
            DiffxError: if it cannot be written.
        """
        name = self.names[i]
        path = self.folder / name
        for left in self.folder.glob(f".{path.stem}.*.tmp.tar"):  # by a process killed while it wrote
            left.unlink(missing_ok=True)
        digest = hashlib.sha256()
        with (
            atomic_path(path) as temporary,
            temporary.open("wb") as file,
            tarfile.open(mode="w|", fileobj=_Hashed(file, digest)) as tar,  # pyright: ignore
        ):
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        record = {"shard": asdict(Shard(name, contents.count, path.stat().st_size, digest.hexdigest()))}
        if contents.count:
            save_index(index_shard(path), beside(path))
        else:
            path.unlink()
        write_text(self._record(name), json.dumps({**record, "contents": vars(contents)}) + "\n")

    def totals(self) -> tuple[list[Shard], Contents]:
        """All shards that hold something, and what they hold together, added up in their order."""
        shards, contents = [], Contents()
        for name in self.names:
            said = json.loads(self._record(name).read_text(encoding="utf-8"))
            shards.append(Shard(**said["shard"]))
            contents.add(Contents(**said["contents"]))
        return [shard for shard in shards if shard.count], contents

    def finish(self, manifest: Manifest) -> None:
        """Moves the shards up, writes the manifest and clears away. May be done by several processes at a time."""
        for shard in manifest.shards:
            for path in (self.folder / shard.name, beside(self.folder / shard.name)):
                with suppress(FileNotFoundError):  # moved by another, or before this process was interrupted
                    path.replace(self.dest / path.name)
        manifest.save(self.dest)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: Any, digest: Any) -> None:
        self.file = file
        self.digest = digest

    def write(self, data: bytes) -> int:
        """Writes and hashes."""
        self.digest.update(data)
        return self.file.write(data)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def verify(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard compared with its manifest; empty if nothing is."""
    path = folder / shard.name
    if not path.is_file():
        return "is missing"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == shard.sha256 else f"has the sha256 {found[:12]}…, not {shard.sha256[:12]}…"
