"""What was computed from images once, kept in files that concurrent jobs share."""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffx.metrics.extractors import Extractor
from diffx.metrics.statistics import Statistics
from diffx.utils import DiffxError, atomic_path

_FORMAT = "2"
T = TypeVar("T")


class Cache:
    """The files about one set of images under one extractor.

    The key is made of the images' fingerprint, the extractor's name and weights, and its preprocessing. Files are
    renamed into place when they are whole, so that jobs that write the same one at a time do no harm.

    Arguments:
        extractor: maps images to features.
        fingerprint: what the images are; two sets with one fingerprint are taken for the same, and one without any is
            not cached.
        directory: the folder; `$XDG_CACHE_HOME/diffx/statistics` (or `~/.cache/…`) by default.
    """

    def __init__(self, extractor: Extractor, fingerprint: str, directory: str | Path | None = None) -> None:
        if directory is None:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx" / "statistics"
        self.directory = Path(directory)
        self.extractor = extractor
        self.identity = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "extractor": extractor.name,
            "weights_hash": extractor.weights_hash,
            "preprocessing": extractor.preprocessing,
        }

    def path(self, name: str) -> Path:
        """Where the file of this name lies, as `statistics.npz`."""
        key = hashlib.sha256("\0".join(self.identity.values()).encode()).hexdigest()[:32]
        return self.directory / f"{self.extractor.name}-{key}-{name}"

    def statistics(self, compute: Callable[[], Statistics]) -> Statistics:
        """The statistics of the images, from the file or computed and put there."""

        def load(path: Path) -> Statistics:
            found = Statistics.load(path)
            if found.fingerprint != self.identity["fingerprint"]:
                raise DiffxError(f"the statistics at '{path}' are of other images")
            found.check(self.extractor)
            return found

        return self._get("statistics.npz", load, compute, Statistics.save)

    def tensors(self, name: str, shapes: dict[str, tuple[int, ...]], compute: Callable[[], dict[str, Tensor]]) -> dict:
        """Named tensors of known shapes, from the file `<name>.safetensors` or computed and put there."""

        def load(path: Path) -> dict[str, Tensor]:
            try:
                with safe_open(path, framework="pt") as file:
                    found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                    identity = file.metadata()
            except (SafetensorError, OSError) as error:
                raise DiffxError(f"'{path}' is damaged ({error})") from error
            if identity != self.identity or {k: tuple(v.shape) for k, v in found.items()} != shapes:
                raise DiffxError(f"'{path}' is of other images or features")
            return found

        def save(tensors: dict[str, Tensor], path: Path) -> None:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, self.identity)

        return self._get(f"{name}.safetensors", load, compute, save)

    def _get(
        self, name: str, load: Callable[[Path], T], compute: Callable[[], T], save: Callable[[T, Path], None]
    ) -> T:
        """The content of a file, unless it is absent or of no use on any rank: then all ranks compute it together."""
        if not self.identity["fingerprint"]:
            return compute()
        path, found = self.path(name), None
        if path.exists():
            try:
                found = load(path)
            except DiffxError as error:
                warnings.warn(f"computing anew what metrics compare with: {error}", stacklevel=4)
        if _on_all_ranks(found is not None, self.extractor.device) and found is not None:
            return found
        found = compute()
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                save(found, path)
            except DiffxError as error:
                warnings.warn(f"what metrics compare with is not cached: {error}", stacklevel=4)
        return found


def _on_all_ranks(flag: bool, device: torch.device) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    agreed = torch.tensor(int(flag), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)
