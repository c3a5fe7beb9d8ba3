"""What a folder of shards holds: `manifest.json`, written when all of it is there."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffx.utils import DiffxError, write_text

MANIFEST = "manifest.json"
_FORMAT = "diffx-shards-1"


@dataclass
class Contents:
    """What was counted while a shard was written, or several.

    Arguments:
        count: samples.
        classes: samples by class; the empty key is those without one.
        parts: samples by the extension of their image and of whatever goes with it.
        sizes: samples by height x width in pixels.
        skipped: what was left out, by key, and why.
        sums: numbers to be added up, such as those behind means.
    """

    count: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: "Contents") -> None:
        """Takes in what another shard holds."""
        self.count += other.count
        self.classes.update(other.classes)
        self.parts.update(other.parts)
        self.sizes.update(other.sizes)
        self.skipped |= other.skipped
        for name, values in other.sums.items():
            old = self.sums.get(name, [0.0] * len(values))
            self.sums[name] = [a + b for a, b in zip(old, values, strict=True)]


@dataclass(frozen=True)
class Shard:
    """One shard as it was written.

    Arguments:
        name: its file name.
        count: its samples.
        bytes: its size.
        sha256: the hash of its bytes.
    """

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards.

    Arguments:
        count: samples.
        num_classes: classes; 0 where there are no labels.
        class_names: their names, empty where they are not known.
        class_counts: samples by class.
        parts: samples by the extension of their image and of whatever goes with it.
        sizes: samples by height x width in pixels.
        settings: how they were written.
        source: what they were made of.
        shards: the shards.
        skipped: samples that could not be read, by key, and why.
        latents: of shards of latents: their shape, statistics and autoencoder; empty otherwise.
    """

    count: int
    num_classes: int
    class_names: tuple[str, ...]
    class_counts: list[int]
    parts: dict[str, int]
    sizes: dict[str, int]
    settings: dict[str, Any]
    source: dict[str, Any]
    shards: list[Shard]
    skipped: dict[str, str]
    latents: dict[str, Any]

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change when any byte of any shard does."""
        text = json.dumps([_FORMAT, [[shard.name, shard.sha256] for shard in self.shards], self.class_names])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the manifest of a folder, whole or not at all."""
        content = {"format": _FORMAT, **asdict(self), "fingerprint": self.fingerprint()}
        write_text(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def beside(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder; None if it has none.

        Raises:
            DiffxError: if it is damaged or of another version of diffx.
        """
        file = folder / MANIFEST
        if not file.is_file():
            return None
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            if said.pop("format") != _FORMAT:
                raise ValueError("it is of another version of diffx")
            fingerprint = said.pop("fingerprint")
            said["shards"] = [Shard(**shard) for shard in said["shards"]]
            said["class_names"] = tuple(said["class_names"])
            manifest = cls(**said)
            if manifest.fingerprint() != fingerprint:
                raise ValueError("it has been changed by hand")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiffxError(f"'{file}' cannot be used ({error}); pack the shards anew") from error
        return manifest

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            DiffxError: if there is none, or it is damaged.
        """
        manifest = cls.beside(folder)
        if manifest is None:
            raise DiffxError(
                f"'{folder}' has no {MANIFEST}; give a folder that diffx data pack or encode has finished, or run that "
                "command again"
            )
        return manifest


def class_counts(contents: Contents, num_classes: int | None) -> list[int]:
    """Samples by class; as many classes as stated, or as there are labels."""
    labels = [int(label) for label in contents.classes if label]
    total = max(max(labels, default=-1) + 1, num_classes or 0) if labels else 0
    return [contents.classes[str(label)] for label in range(total)]
