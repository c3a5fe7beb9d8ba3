"""Which image files a folder holds, their classes and their splits."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from diffx.data.base import SplitName
from diffx.data.decode import SUFFIXES
from diffx.data.held_out import held_out
from diffx.utils import DiffxError


@dataclass(frozen=True)
class Listing:
    """The images of one split.

    Arguments:
        folder: the folder that the names start from.
        names: the files, sorted within each class.
        labels: the class of each, 0 where there are none.
        classes: the names of the classes, sorted.
    """

    folder: Path
    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]


def list_images(folder: Path, labels: bool) -> Listing:
    """All images below a folder.

    Arguments:
        folder: where to look.
        labels: whether its subfolders, if there are any, are classes.

    Raises:
        DiffxError: if there are no images, a class is empty, or images lie beside class folders.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = tuple(entry.name for entry in entries if entry.is_dir()) if labels else ()
    if not classes:
        names = _files_below(folder, folder)
        if not names:
            raise DiffxError(
                f"'{folder}' has no images ({' '.join(SUFFIXES)}); set data.root to the folder of the images"
            )
        return Listing(folder, names, [0] * len(names), ())
    loose = next((entry for entry in entries if _is_image(entry.name) and entry.is_file()), None)
    if loose is not None:
        raise DiffxError(
            f"'{folder}' has both class folders and images beside them, such as {loose.name}; move those into a class "
            "folder, or set data.labels=false and data.num_classes=0"
        )
    members = [_files_below(folder / name, folder) for name in classes]
    for name, files in zip(classes, members, strict=True):
        if not files:
            raise DiffxError(
                f"the class folder '{folder / name}' has no images ({' '.join(SUFFIXES)}); remove it, or, if folders "
                "are no classes, set data.labels=false and data.num_classes=0"
            )
    labelled = [(file, label) for label, files in enumerate(members) for file in files]
    return Listing(folder, [file for file, _ in labelled], [label for _, label in labelled], classes)


def _files_below(top: Path, start: Path) -> list[str]:
    """All images below `top`, sorted, with names relative to `start`."""
    files, seen = [], set()
    for folder, folders, names in os.walk(top, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # links to folders are followed, but not in circles
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        prefix = Path(folder).relative_to(start)
        files += [(prefix / name).as_posix() for name in names if _is_image(name)]
    return sorted(files)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def matching(train: Listing, test: Listing) -> dict[SplitName, Listing]:
    """Two folders as the two splits.

    Raises:
        DiffxError: if they have different classes.
    """
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise DiffxError(
            f"'{train.folder}' and '{test.folder}' must have the same class folders, but '{odd}' is in only one "
            "of them; add or remove it"
        )
    return {"train": train, "test": test}


def divided(listing: Listing, fraction: float) -> dict[SplitName, Listing]:
    """One folder as both splits: `fraction` of each class is held out, chosen by the files' names."""
    count = max(round(fraction * len(listing.names)), 1) if fraction else 0
    identity = torch.tensor([_number(name) for name in listing.names])
    out = held_out(torch.tensor(listing.labels), identity, count).tolist()

    def part(keep: bool) -> Listing:
        chosen = [i for i, held in enumerate(out) if held == keep]
        names, labels = [listing.names[i] for i in chosen], [listing.labels[i] for i in chosen]
        return Listing(listing.folder, names, labels, listing.classes)

    return {"train": part(False), "test": part(True)}


def _number(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
