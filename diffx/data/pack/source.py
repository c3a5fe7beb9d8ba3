"""What can be packed: samples by position, whatever they are stored in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from diffx.utils import DiffxError

KeyNames = Literal["names", "numbers"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with what belongs to it.

    Arguments:
        name: what messages call it.
        image: a file's bytes, or pixels, uint8 `[H, W, C]`.
        label: its class, None where there is none.
        extras: further parts by extension, such as `txt` and `json`, as they are.
    """

    name: str
    image: bytes | np.ndarray
    label: int | None = None
    extras: dict[str, bytes] = field(default_factory=dict)


class PackSource(ABC):
    """Images to be packed. Reads lazily and can be sent to another process.

    Arguments:
        where: the place, as the user will recognize it.
        class_names: the names of the classes in order; empty where they are not known.
    """

    def __init__(self, where: str, class_names: tuple[str, ...] = ()) -> None:
        self.where = where
        self.class_names = class_names

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples N."""

    @abstractmethod
    def read(self, i: int) -> Sample:
        """The sample at a position in 0..N-1.

        Raises:
            DiffxError: if it cannot be read, naming it.
        """

    @abstractmethod
    def key(self, i: int) -> str:
        """A key made of the sample's name, without dots behind its last slash; empty where samples have no names."""

    @abstractmethod
    def identity(self) -> str:
        """What changes when other samples stand at the positions, found out without reading them all."""

    @abstractmethod
    def blocks(self) -> list[int]:
        """How many neighbours are read together, in order; empty where any sample can be read by itself."""


def keys_of(source: PackSource, names: KeyNames) -> list[str]:
    """The key of every sample.

    Arguments:
        source: the samples.
        names: `names`, or `numbers` for their positions.

    Raises:
        DiffxError: if two samples have one key.
    """
    digits = max(len(str(len(source) - 1)), 6)
    keys = [(source.key(i) if names == "names" else "") or f"{i:0{digits}d}" for i in range(len(source))]
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise DiffxError(
            f"{source.where} has two samples of the key '{twice}'; rename one, or number them all with keys=numbers"
        )
    return keys


def checked_label(sample: Sample, num_classes: int | None) -> int | None:
    """The label of a sample.

    Arguments:
        sample: the sample.
        num_classes: the number of classes, None where it is not known.

    Raises:
        DiffxError: if it is no class.
    """
    label = sample.label
    if label is not None and (label < 0 or (num_classes is not None and label >= num_classes)):
        allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
        raise DiffxError(
            f"'{sample.name}' has the label {label}, but classes are {allowed}; correct it, or leave all labels out "
            "with classes=false"
        )
    return label
