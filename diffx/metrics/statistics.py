"""Mean and covariance of the features of a set of images: computed once, kept in files, shared by concurrent jobs."""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from diffx.metrics.accumulators import FeatureMoments, mean_and_covariance
from diffx.metrics.extractors import Extractor, extract
from diffx.utils import DiffxError, atomic_path

_FORMAT = "1"


@dataclass(frozen=True)
class Statistics:
    """The statistics of a set of images in a feature space.

    Arguments:
        mean: float64 `[D]`.
        cov: the unbiased covariance, float64 `[D, D]`.
        n: the number of images; `None` where a published file does not say.
        fingerprint: what the images are; empty where unknown.
        extractor: the extractor's name; empty where unknown.
        weights_hash: the hash of its weights; empty where unknown.
        preprocessing: its preprocessing; empty where unknown.
    """

    mean: Tensor
    cov: Tensor
    n: int | None = None
    fingerprint: str = ""
    extractor: str = ""
    weights_hash: str = ""
    preprocessing: str = ""

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` with `mu`, `sigma` and the other fields, whole or not at all.

        Raises:
            DiffxError: if the file cannot be written, or is not named `*.npz`.
        """
        if Path(path).suffix != ".npz":
            raise DiffxError(f"statistics are kept in .npz files: name '{path}' so")
        texts = {name: getattr(self, name) for name in _TEXTS}
        n = -1 if self.n is None else self.n
        with atomic_path(path) as temporary:
            np.savez(temporary, mu=self.mean.cpu().numpy(), sigma=self.cov.cpu().numpy(), n=n, **texts)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote, or a published `.npz` with `mu` and `sigma`.

        Raises:
            DiffxError: if the file is absent, damaged, or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, cov = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("mu", "sigma"))
                n = int(file["n"]) if "n" in file else -1
                texts = {name: str(file[name]) for name in _TEXTS if name in file}
        except FileNotFoundError as error:
            raise DiffxError(f"there are no statistics at '{path}': compute them, or correct the path") from error
        except KeyError as error:
            raise DiffxError(f"'{path}' holds no statistics: an .npz with arrays mu and sigma is needed") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DiffxError(f"the statistics at '{path}' are damaged ({error}): delete and recompute them") from error
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise DiffxError(
                f"'{path}' holds no statistics: mu of shape [D] and sigma of shape [D, D] are needed, "
                f"not {list(mean.shape)} and {list(cov.shape)}"
            )
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise DiffxError(f"the statistics at '{path}' are not finite: recompute them")
        return cls(mean, cov, n if n >= 0 else None, **texts)

    def check(self, extractor: Extractor) -> None:
        """Makes sure that these statistics are of this extractor's features.

        Raises:
            DiffxError: if they are of another one.
        """
        theirs, ours = (self.extractor, self.weights_hash), (extractor.name, extractor.weights_hash)
        known = all(theirs)
        if len(self.mean) != extractor.dim or (known and theirs != ours):
            raise DiffxError(
                f"the reference statistics are of the {len(self.mean)} features of extractor "
                f"'{self.extractor or 'unknown'}' (weights {self.weights_hash[:12] or 'unknown'}) and do not fit the "
                f"{extractor.dim} of '{extractor.name}' ({extractor.weights_hash[:12]}): recompute them with this one"
            )


_TEXTS = ("fingerprint", "extractor", "weights_hash", "preprocessing")


def reference_statistics(
    images: Iterable[Tensor], extractor: Extractor, fingerprint: str = "", progress: bool = False
) -> Statistics:
    """The statistics of images, in one pass, in float64.

    Where `torch.distributed` runs, every rank has to call it with the same batches; each rank extracts the features of
    its share of them, and all get the statistics of the whole.

    Arguments:
        images: batches uint8 `[B, C, H, W]`.
        extractor: maps images to features; its device does the work.
        fingerprint: what the images are, to be kept with the statistics.
        progress: whether to show a progress bar.

    Raises:
        DiffxError: if there are fewer than two images.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    centre = torch.zeros(extractor.dim, dtype=torch.float64, device=extractor.device)
    moments = None
    for i, batch in enumerate(track(images, f"statistics ({extractor.name})", disable=not progress)):
        features = extract(extractor, batch)[0] if i % ranks == rank else None
        if moments is None:
            # any constant near the mean will do; all ranks need the same
            if features is not None:
                centre = features.to(torch.float64).mean(dim=0)
            if ranks > 1:
                dist.broadcast(centre, src=0)
            moments = FeatureMoments(centre, blocks=1).to(centre.device)
        if features is not None:
            moments.update(features, torch.zeros(len(features), dtype=torch.int64, device=features.device))
    sums = moments.totals() if moments is not None else None
    if sums is None or sums[0].item() < 2:
        raise DiffxError("statistics need at least 2 images: give a larger reference set")
    count, first, second = sums
    mean, cov = mean_and_covariance(count[0], first[0], second[0], centre)
    return Statistics(
        mean.cpu(),
        cov.cpu(),
        int(sums[0].item()),
        fingerprint,
        extractor.name,
        extractor.weights_hash,
        extractor.preprocessing,
    )


def cached_statistics(
    images: Callable[[], Iterable[Tensor]],
    extractor: Extractor,
    fingerprint: str,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Statistics:
    """The statistics of images from the cache, or computed and put there.

    The key is made of the images' fingerprint, the extractor's name and weights, and its preprocessing. A damaged file
    is computed anew; a cache that cannot be written costs a warning. Where `torch.distributed` runs, every rank has to
    call it: they compute together unless all of them find the file.

    Arguments:
        images: called to get the batches, uint8 `[B, C, H, W]`, if they are needed.
        extractor: maps images to features.
        fingerprint: what the images are; two sets with one fingerprint are taken for the same.
        cache_dir: the folder; `$XDG_CACHE_HOME/diffx/statistics` (or `~/.cache/…`) by default.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the fingerprint is empty.
        DiffxError: if there are fewer than two images.
    """
    if not fingerprint:
        raise ValueError("only images with a fingerprint can be cached")
    path = statistics_path(extractor, fingerprint, cache_dir)
    statistics = _cached(path, fingerprint)
    together = dist.is_initialized() and dist.get_world_size() > 1
    if together:
        found = torch.tensor(int(statistics is not None), device=extractor.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        statistics = statistics if found else None
    if statistics is not None:
        return statistics
    statistics = reference_statistics(images(), extractor, fingerprint, progress)
    if not together or dist.get_rank() == 0:
        try:
            statistics.save(path)
        except DiffxError as error:
            warnings.warn(f"reference statistics are not cached: {error}", stacklevel=2)
    return statistics


def statistics_path(extractor: Extractor, fingerprint: str, cache_dir: str | Path | None = None) -> Path:
    """Where the cache keeps the statistics of these images under this extractor."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx" / "statistics"
    parts = (_FORMAT, fingerprint, extractor.name, extractor.weights_hash, extractor.preprocessing)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return Path(cache_dir) / f"{extractor.name}-{key}.npz"


def _cached(path: Path, fingerprint: str) -> Statistics | None:
    if not path.exists():
        return None
    try:
        statistics = Statistics.load(path)
    except DiffxError as error:
        warnings.warn(f"computing reference statistics anew: {error}", stacklevel=3)
        return None
    return statistics if statistics.fingerprint == fingerprint else None
