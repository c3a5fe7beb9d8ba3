"""What samples hold, by reading all of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from diffx.data.decode import decode_image
from diffx.data.pack.processes import Tick, each
from diffx.data.pack.source import PackSource, Sample
from diffx.data.pack.tars import ShardSource, array_of
from diffx.data.pack.transform import file_of, header_of
from diffx.utils import DiffxError

_CHUNK = 256
_OF_EACH_CLASS = 100


@dataclass
class Inspection:
    """What was found.

    Arguments:
        count: samples that could be read.
        classes: samples by class; None is those without one.
        sizes: images by height and width.
        modes: images by PIL's mode, or by the type of their array.
        broken: what is wrong, by position.
        sums: of the values of each channel, their squares, and their number, by the number of channels.
        chosen: positions of some samples of each class, for a picture.
    """

    count: int = 0
    classes: Counter[int | None] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    broken: dict[int, str] = field(default_factory=dict)
    sums: dict[int, np.ndarray] = field(default_factory=dict)
    chosen: dict[int | None, list[int]] = field(default_factory=dict)

    def add(self, i: int, label: int | None, mode: str, values: np.ndarray) -> None:
        """Takes in one sample.

        Arguments:
            i: its position.
            label: its class.
            mode: its mode.
            values: float64 or integers `[C, H, W]`.
        """
        channels, height, width = values.shape
        self.count += 1
        self.classes[label] += 1
        self.sizes[height, width] += 1
        self.modes[mode] += 1
        flat = values.reshape(channels, -1).astype(np.float64)
        new = np.stack([flat.sum(1), np.square(flat).sum(1), np.full(channels, flat.shape[1])])
        self.sums[channels] = self.sums.get(channels, 0) + new
        mine = self.chosen.setdefault(label, [])
        if len(mine) < _OF_EACH_CLASS:
            mine.append(i)

    def merge(self, other: "Inspection") -> None:
        """Takes in what was found of later samples."""
        self.count += other.count
        for name in ("classes", "sizes", "modes"):
            getattr(self, name).update(getattr(other, name))
        self.broken |= other.broken
        for channels, sums in other.sums.items():
            self.sums[channels] = self.sums.get(channels, 0) + sums
        for label, mine in other.chosen.items():
            self.chosen[label] = (self.chosen.get(label, []) + mine)[:_OF_EACH_CLASS]

    def moments(self) -> dict[int, tuple[list[float], list[float]]]:
        """Mean and standard deviation of each channel over all values, by the number of channels."""
        found = {}
        for channels, (total, squares, n) in sorted(self.sums.items()):
            mean = total / n
            found[channels] = mean.tolist(), np.sqrt(np.maximum(squares / n - mean**2, 0)).tolist()
        return found


def inspect(
    source: PackSource,
    latents: bool = False,
    workers: int = 1,
    on_sample: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> Inspection:
    """Reads every sample; images are decoded, of latents the means are looked at.

    Arguments:
        source: the samples.
        latents: whether they are latents.
        workers: processes; the result does not depend on it.
        on_sample: called now and then with the number of samples read.
        stop: asked now and then whether to stop.

    Raises:
        Stop: if stopped.
    """
    look = look_at_latent if latents else look_at_image

    def chunk(k: int, tick: Tick) -> Inspection:
        found = Inspection()
        for i in range(k * _CHUNK, min((k + 1) * _CHUNK, len(source))):
            try:
                found.add(i, *look(source, i))
            except DiffxError as error:
                found.broken[i] = str(error)
            tick()
        return found

    parts = dict(each(chunk, range(-(-len(source) // _CHUNK)), workers, on_sample, stop))
    whole = Inspection()
    for k in sorted(parts):
        whole.merge(parts[k])
    return whole


def look_at_image(source: PackSource, i: int) -> tuple[int | None, str, np.ndarray]:
    """Label, mode and pixels `[C, H, W]` of an image in its own size."""
    sample = source.read(i)
    header = header_of(file_of(sample), sample.name)
    return sample.label, header.mode, pixels_of(sample, (header.height, header.width), header.grey)


def look_at_latent(source: PackSource, i: int) -> tuple[int | None, str, np.ndarray]:
    """Label, type and mean `[c, h, w]` of a latent."""
    assert isinstance(source, ShardSource)
    name, parts = source.parts(i)
    if "npy" not in parts:
        raise DiffxError(f"'{name}' has no part npy; encode it anew")
    array = array_of(parts["npy"], name)
    if array.ndim != 3 or array.dtype.kind != "f" or len(array) % 2:
        raise DiffxError(f"'{name}' holds {array.dtype} {list(array.shape)}, no moments; encode it anew")
    if not np.isfinite(array).all():
        raise DiffxError(f"'{name}' is not finite; encode it anew, with dtype=float32")
    return int(parts["cls"]) if "cls" in parts else None, str(array.dtype), array[: len(array) // 2]


def pixels_of(sample: Sample, size: tuple[int, int], grey: bool) -> np.ndarray:
    """The image of a sample in a size, uint8 `[C, height, width]`."""
    return decode_image(file_of(sample), sample.name, 1 if grey else 3, size, True).transpose(2, 0, 1)
