"""A checkpoint on disk: one file or, where several processes write, one file and the shards that it names.

`step=00001000.ckpt` is written last, so that its presence means whole. Beside plain values it holds the tensors, or in
their place empty ones on the device `meta`: those are in the shards, by their paths, as
`optimizer_states/0/state/3/exp_avg`. A shard is named after the step, the rank, the number of ranks and a word of the
process that wrote it, so that it is never taken for one of another attempt at the same step.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.utils import DiffxError, atomic_path, patiently

SHARDS = "shards"
"""What a checkpoint names its shards under."""


def write_file(content: Any, path: Path) -> None:
    """Writes atomically: to a temporary name, synced, then renamed.

    Raises:
        DiffxError: if the disk is full.
    """
    patiently(lambda: _write(content, path))


def _write(content: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
            raise DiffxError(
                f"cannot write the checkpoint '{path}': {error}; free some space, then run the same command again "
                "to resume"
            ) from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint, its shards included, on any number of processes; nothing is unpickled from a stranger.

    Arguments:
        path: the file, `step=00001000.ckpt`.
        map_location: where its tensors go.
        mmap: whether tensors are read only when they are needed.

    Raises:
        Exception: torch raises half a dozen unrelated types for a damaged file; a shard may be missing.
    """
    path = Path(path)
    whole = _load(path, map_location, mmap)
    parts: dict[str, Tensor] = {}
    for name in whole.pop(SHARDS, []):
        parts |= _load(path.with_name(name), map_location, mmap)
    return mapped(whole, lambda where, tensor: parts[where] if tensor.is_meta else tensor) if parts else whole


def _load(path: Path, map_location: Any, mmap: bool) -> dict[str, Any]:
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def shards_of(path: Path) -> list[Path]:
    """The files that a checkpoint names, whether they are there or not; none of one that cannot be read."""
    try:
        return [path.with_name(name) for name in _load(path, "cpu", mmap=True).get(SHARDS, [])]
    except Exception:  # half a dozen unrelated types: what is wrong with it is said when it is loaded
        return []


def shard_file(path: Path, rank: int, ranks: int, word: str) -> Path:
    """The name of a rank's shard: no other name may begin with `step=`."""
    return path.with_name(f"{_shards(path)}{rank + 1}of{ranks}-{word}.ckpt")


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, its shards after it: what is left when killed in between is not taken for one."""
    path.unlink(missing_ok=True)
    for shard in path.parent.glob(f"{_shards(path)}*.ckpt"):
        shard.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes have left: temporary files, and shards without their checkpoint."""
    for pattern in (".step=*.tmp.ckpt", ".shard=*.tmp.ckpt"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    for file in folder.glob("shard=*.ckpt"):
        step = file.name.removeprefix("shard=").partition("-")[0]
        if not file.with_name(f"step={step}.ckpt").is_file():
            file.unlink(missing_ok=True)


def _shards(path: Path) -> str:
    return f"shard={path.stem.removeprefix('step=')}-"


def mapped(value: Any, change: Callable[[str, Tensor], Any], where: str = "") -> Any:
    """A copy of nested dicts, lists and plain values in which every tensor is replaced.

    Arguments:
        value: the content of a checkpoint.
        change: gives what stands in a tensor's place, from its path, as `state_dict/ema.denoiser.bias`, and itself.
        where: the path of `value`.
    """
    below = f"{where}/" if where else ""
    if isinstance(value, Tensor):
        return change(where, value)
    if isinstance(value, dict):
        return {key: mapped(each, change, f"{below}{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([mapped(each, change, f"{below}{k}") for k, each in enumerate(value)])
    return copy.deepcopy(value)


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their paths."""
    found: dict[str, Tensor] = {}
    mapped(value, found.setdefault)
    return found


def dealt(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Deals things out to ranks so that the shares are about equal: the largest first, to who has least.

    Arguments:
        sizes: their sizes by their names.
        ranks: the number of ranks.

    Returns:
        The rank of each, the same wherever it is asked.
    """
    shares, loads = {}, [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[name] = rank
        loads[rank] += sizes[name]
    return shares
