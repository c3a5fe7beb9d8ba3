"""From images to shards of latents."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffx.autoencoders import Variational
from diffx.data.latents.stream import MIRRORED, MOMENTS
from diffx.data.pack import Layout, Manifest, PackSource, Sample, ShardSource, Transform
from diffx.data.pack.manifest import Contents, class_counts
from diffx.data.pack.pack import order_of, shard_names, write_shards
from diffx.data.pack.processes import Tick
from diffx.data.pack.source import checked_label, keys_of
from diffx.data.pack.writer import Member, Staging
from diffx.utils import DiffxError


class Encoding:
    """One split on its way to latents.

    Shards become shards of the same samples in the same order; all else is cut into shards as the layout says.

    Arguments:
        source: the images.
        dest: the folder of the latents, new or empty, or begun with the same settings.
        autoencoder: encodes them.
        transform: crops, scales and converts the images.
        layout: how samples go into shards, where the source has none.
        dtype: of the stored moments, `float16` or `float32`.
        flip: whether the mirror image is encoded too.
        batch_size: images at a time.
        threads: threads that read images.

    Raises:
        DiffxError: if there are no images, or the autoencoder does not take them.
    """

    def __init__(
        self,
        source: PackSource,
        dest: Path,
        autoencoder: Variational,
        transform: Transform,
        layout: Layout,
        *,
        dtype: str,
        flip: bool,
        batch_size: int,
        threads: int,
    ) -> None:
        self.source = source
        self.dest = dest
        self.autoencoder = autoencoder
        self.transform = transform
        self.dtype = np.dtype(dtype)
        self.flip = flip
        self.batch_size = batch_size
        self.threads = threads
        if not len(source):
            raise DiffxError(f"{source.where} has no samples; give a source with images")
        self.order, self.sizes = _cut(source, layout)
        self.num_classes = layout.num_classes or len(source.class_names) or None
        self.keys = keys_of(source, layout.keys)
        height, width, channels = transform.pixels(source.read(0)).shape
        if height != width:
            raise DiffxError(
                f"the first image of {source.where} has {width}x{height} pixels, and latents are those of square "
                "images; set image_size=N to scale and crop them"
            )
        self.image = [channels, height, width]
        self.shape = list(autoencoder.latent_shape(channels, height))
        settings = {
            **asdict(transform),
            **asdict(layout),
            "dtype": dtype,
            "flip": flip,
            "autoencoder": self.fingerprint,
        }
        told = {"count": len(source), "identity": source.identity()}
        self.staging = Staging(dest, shard_names(len(self.sizes)), {"samples": told, "settings": settings})

    @cached_property
    def fingerprint(self) -> str:
        """The autoencoder's."""
        return self.autoencoder.fingerprint()

    def __call__(
        self,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        on_sample: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Manifest | None:
        """Encodes this rank's shards; whoever ends last writes the manifest.

        Arguments:
            device: where to encode.
            rank: shard i is encoded by rank i mod world_size.
            world_size: the number of ranks; they do not meet.
            on_sample: called now and then with the number of samples done and their total, of this rank.
            stop: asked after each sample whether to stop.

        Returns:
            The manifest; None where other ranks have not ended.

        Raises:
            Interrupted: if stopped.
            DiffxError: for bad samples, another folder, or what cannot be written.
        """
        if self.staging.begin():
            return Manifest.load(self.dest)
        self.autoencoder.to(device)
        with self.staging.lock(rank, world_size), ThreadPoolExecutor(self.threads) as pool:
            write_shards(
                lambda i, tick: self._shard(i, tick, device, pool),
                self.staging,
                self.sizes,
                1,
                on_sample,
                stop,
                rank,
                world_size,
            )
            return None if self.staging.missing() else self._finished()

    def _finished(self) -> Manifest:
        try:
            shards, contents = self.staging.totals()
        except FileNotFoundError:  # another rank was quicker
            return Manifest.load(self.dest)
        counts = class_counts(contents, self.num_classes)
        (n,), total, squares = (np.array(contents.sums[name]) for name in ("n", "sum", "squares"))
        mean = total / n
        autoencoder = {
            "class": type(self.autoencoder).__name__,
            "fingerprint": self.fingerprint,
            "shift": self.autoencoder.shift.tolist(),
            "scale": self.autoencoder.scale.tolist(),
        }
        manifest = Manifest(
            contents.count,
            len(counts),
            self.source.class_names,
            counts,
            dict(sorted(contents.parts.items())),
            dict(contents.sizes.most_common()),
            self.staging.plan["settings"],
            {"path": self.source.where.strip("'"), **self.staging.plan["samples"]},
            shards,
            {},
            {
                "shape": self.shape,
                "image": self.image,
                "dtype": str(self.dtype),
                "flip": self.flip,
                "mean": mean.tolist(),
                "std": np.sqrt(np.maximum(squares / n - mean**2, 0)).tolist(),
                "autoencoder": autoencoder,
            },
        )
        self.staging.finish(manifest)
        return manifest

    def _shard(self, i: int, tick: Tick, device: torch.device, pool: ThreadPoolExecutor) -> None:
        contents = Contents()
        self.staging.write(i, self._members(i, contents, tick, device, pool), contents)

    def _members(
        self, i: int, contents: Contents, tick: Tick, device: torch.device, pool: ThreadPoolExecutor
    ) -> Iterator[Member]:
        first = sum(self.sizes[:i])
        batches = torch.arange(first, first + self.sizes[i]).split(self.batch_size)
        ahead = [pool.submit(self._read, int(n)) for n in batches[0]]
        for k, batch in enumerate(batches):
            read = [future.result() for future in ahead]
            ahead = [pool.submit(self._read, int(n)) for n in batches[k + 1]] if k + 1 < len(batches) else []
            x = torch.from_numpy(np.stack([pixels for _, pixels in read]))
            parts = {MOMENTS: self._moments(x.to(device))}
            if self.flip:
                parts[MIRRORED] = self._moments(x.to(device).flip(-1))
            self._count(contents, torch.from_numpy(parts[MOMENTS]), batch)
            for b, (sample, _) in enumerate(read):
                arrays = {name: array[b] for name, array in parts.items()}
                yield from self._sample(int(self.order[batch[b]]), sample, arrays, contents)
                tick()

    def _sample(
        self, place: int, sample: Sample, arrays: dict[str, np.ndarray], contents: Contents
    ) -> Iterator[Member]:
        label = checked_label(sample, self.num_classes)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise DiffxError(f"the latent of '{sample.name}' is not finite as {self.dtype}; set dtype=float32")
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array))
            yield f"{self.keys[place]}.{name}", buffer.getvalue()
        if label is not None:
            yield f"{self.keys[place]}.cls", str(label).encode()
        for extension, data in sorted(sample.extras.items()):
            yield f"{self.keys[place]}.{extension}", data
        contents.count += 1
        contents.classes["" if label is None else str(label)] += 1
        contents.parts.update([*arrays, *(["cls"] if label is not None else []), *sample.extras])
        contents.sizes["x".join(map(str, self.image[1:]))] += 1

    def _read(self, n: int) -> tuple[Sample, np.ndarray]:
        sample = self.source.read(int(self.order[n]))
        pixels = self.transform.pixels(sample).transpose(2, 0, 1)
        if list(pixels.shape) != self.image:
            raise DiffxError(
                f"'{sample.name}' is {'x'.join(map(str, pixels.shape))}, and the first image is "
                f"{'x'.join(map(str, self.image))}; set image_size=N to scale and crop them all"
            )
        return sample, pixels

    @torch.no_grad()
    def _moments(self, x: Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):  # what overflows is refused, naming the sample
            return self.autoencoder.encoded(x).cpu().numpy().astype(self.dtype)

    def _count(self, contents: Contents, moments: Tensor, n: Tensor) -> None:
        """Adds up draws of the latents as they are stored, per channel in float64."""
        drawn = self.autoencoder.drawn(moments, n).double()
        new = {
            "n": [float(drawn[:, 0].numel())],
            "sum": drawn.sum((0, 2, 3)).tolist(),
            "squares": drawn.square().sum((0, 2, 3)).tolist(),
        }
        contents.add(Contents(sums=new))


def _cut(source: PackSource, layout: Layout) -> tuple[np.ndarray, list[int]]:
    """The order of the samples, and how many go into each shard."""
    if isinstance(source, ShardSource):
        return np.arange(len(source)), [len(index) for index in source.indexes]
    per_shard = layout.samples
    if per_shard is None:
        raise DiffxError("latents have one size each; set shard_size to a number of samples")
    sizes = [min(per_shard, len(source) - first) for first in range(0, len(source), per_shard)]
    return order_of(source, layout), sizes
