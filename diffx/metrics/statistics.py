"""Mean and covariance of the features of a set of images, and the files they are kept in."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffx.metrics.extractors import Extractor
from diffx.utils import DiffxError, atomic_path


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
        """Reads what `save` wrote, or a published `.npz` with `mu` and `sigma`: ADM's, EDM's or clean-fid's.

        What else such a file holds is left alone. ADM's `arr_0` are not the images behind `mu` and `sigma` but fewer,
        so that their number stays unknown.

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
        except (KeyError, TypeError) as error:  # TypeError: an .npy file, one array without names
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
