"""Published weights: where they lie, how they come there, whether they are the published ones."""

import hashlib
from pathlib import Path

import torch

from diffx.utils import DiffxError


def find_weights(what: str, url: str, file: str, sha256: str, given: str | Path | None, download: bool) -> Path:
    """The file of published weights: the given one, or the one in torch's cache, downloaded there if asked for.

    Arguments:
        what: how the weights are called in messages, as "Inception".
        url: where they are published.
        file: how they are called in torch's cache.
        sha256: their hash; empty where it is not published.
        given: the path that the user gave.
        download: whether to download what is missing.

    Raises:
        DiffxError: if they are not there, with how to get them.
    """
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise DiffxError(f"there are no {what} weights at '{given}': correct extractor.weights")
        return Path(given).expanduser()
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.is_file():
        return path
    if not download:
        raise DiffxError(
            f"the {what} weights are missing: get {url} and put it at '{path}' or give extractor.weights=PATH, or let "
            "diffx fetch it with extractor.download=true"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # writes to a temporary name and checks the hash before it renames
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None)
    except (OSError, RuntimeError) as error:
        raise DiffxError(
            f"the {what} weights cannot be downloaded ({error}): get {url} by other means and give "
            "extractor.weights=PATH"
        ) from error
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_published(what: str, path: Path, found: str, sha256: str, check: bool) -> bool:
    """Whether a file of weights is the published one.

    Arguments:
        what: how the weights are called in messages.
        path: the file.
        found: its hash.
        sha256: the published hash.
        check: whether to refuse other weights.

    Raises:
        DiffxError: if it is not, and that is refused.
    """
    if check and found != sha256:
        raise DiffxError(
            f"'{path}' is not the published file of {what} weights (its sha256 is {found[:12]}…, not {sha256[:12]}…): "
            "delete it and fetch it again with extractor.download=true, or take it as it is, under other metric names, "
            "with extractor.check_hash=false"
        )
    return found == sha256
