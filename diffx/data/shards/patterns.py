"""Which shards `data.shards` names."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from diffx.utils import DiffxError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def is_remote(name: str) -> bool:
    """Whether a shard has to be fetched: `http://…`, `gs://…`, `pipe:COMMAND` and the like."""
    return bool(_SCHEME.match(name)) and not name.startswith("file:")


def expand(patterns: str | Sequence[str], root: Path, key: str = "data.shards") -> list[str]:
    """The shards that patterns name, in the order of the patterns and sorted within each.

    Arguments:
        patterns: a path, a folder (its `*.tar`), a path with `{000..099}`, `{a,b}`, `*`, `?` or `[…]`, a URL, or
            several of them in a list or with `::` between them.
        root: where relative paths start.
        key: what messages call the setting.

    Returns:
        Paths and URLs.

    Raises:
        DiffxError: if a pattern names no shard, or a shard is named twice.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found = [shard for pattern in listed for one in _braces(pattern, key) for shard in _one(one, root, key)]
    if not found:
        raise DiffxError(f"{key} names no shards; set it to a folder of .tar files, or such as {key}=FOLDER/*.tar")
    if len(set(found)) < len(found):
        twice = next(shard for i, shard in enumerate(found) if shard in found[:i])
        raise DiffxError(
            f"{key} names the shard '{twice}' twice; name it once, or set data.weights to see it more often"
        )
    return found


def _braces(pattern: str, key: str) -> list[str]:
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(pattern))
    except ValueError as error:
        raise DiffxError(
            f"{key}={pattern} cannot be expanded ({error}); close every brace, as in x-{{000..099}}.tar"
        ) from error


def _one(name: str, root: Path, key: str) -> list[str]:
    if is_remote(name):
        return [name]
    path = root / Path(name.removeprefix("file://").removeprefix("file:")).expanduser()
    if path.is_dir():
        found = sorted(str(file) for file in path.glob("*.tar"))
        if not found:
            raise DiffxError(f"the folder '{path}' has no .tar files; set {key} to the folder of the shards")
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (pathlib cannot start at an absolute pattern)
    if not found:
        raise DiffxError(f"nothing matches '{path}'; correct {key}")
    return found
