"""What training data cost: images per core, memory, and the time to the first batch and to a far sample."""

import atexit
import contextlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import Case, Clock
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor
from webdataset.compat import WebDataset as PlainWebDataset
from webdataset.compat import WebLoader
from webdataset.writer import TarWriter

from diffx.data import Folder, GlobalBatches, WebDataset
from diffx.data.decode import decode_image
from diffx.data.shards.index import ShardIndex, save_index

IMAGES: Path | None = None
"""A folder of class folders of JPEGs of 32×32 pixels; without it, crops of photographs scaled to that size."""

IN_PROCESS = False
"""Whether what needs a process of its own does without, as in a quick run: its numbers mean nothing then."""

WORKERS, BATCH, PER_SHARD = 2, 128, 1000
"""BATCH is that of the measurements that compare nothing."""


def cases(quick: bool, clock: Clock) -> list[Case]:
    """Wall-clock time always: the work is done by other processes."""
    global IN_PROCESS
    IN_PROCESS = quick
    seconds = 0.05 if quick else 2.0
    return [
        _speed(32, 256 if quick else 20000, 8 if quick else 256, seconds, 1 if quick else 3),
        _speed(256, 16 if quick else 2000, 4 if quick else 128, seconds, 1 if quick else 3),
        _first_batch(quick),
        _memory(quick),
        _simulated(quick),
    ]


# ---- images ----


def photographs(n: int, size: int) -> Iterable[tuple[bytes, int]]:
    """JPEGs cut out of the two photographs that scikit-learn brings, at quality 95."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    photos = load_sample_images().images
    for k in range(n):
        side = max(size, 64)
        y, x = (int(draw.integers(0, edge - side)) for edge in photos[k % 2].shape[:2])
        image = Image.fromarray(photos[k % 2][y : y + side, x : x + side]).resize((size, size), Image.Resampling.BOX)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        yield file.getvalue(), k % 10


def jpegs(n: int, size: int) -> list[tuple[bytes, int]]:
    """JPEGs and their classes: the user's at 32 pixels, if there are any."""
    if size != 32 or IMAGES is None:
        return list(photographs(n, size))
    folders = sorted(folder for folder in IMAGES.iterdir() if folder.is_dir())
    files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    return [(files[k][0].read_bytes(), files[k][1]) for k in np.random.default_rng(0).permutation(len(files))[:n]]


@cache
def stored(n: int, size: int) -> Path:
    """The same images as a folder, as JPEGs in shards, and decoded in shards."""
    root = scratch() / str(size)
    found = jpegs(n, size)
    for start in range(0, len(found), PER_SHARD):
        for kind in ("jpg", "npy"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            with TarWriter(str(root / kind / f"{start // PER_SHARD:04d}.tar")) as shard:
                for k, (data, label) in enumerate(found[start : start + PER_SHARD], start):
                    shard.write({"__key__": f"{k:08d}", kind: as_stored(data, size, kind), "cls": label})
    for k, (data, label) in enumerate(found):
        folder = root / "folder" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:08d}.jpg").write_bytes(data)
    return root


def as_stored(data: bytes, size: int, kind: str) -> bytes:
    """A JPEG as it is, or decoded."""
    if kind == "jpg":
        return data
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(decode_image(data, "", 3, (size, size), False).transpose(2, 0, 1)))
    return file.getvalue()


# ---- images per second ----


def source(shards: Path, size: int, workers: int = WORKERS, batch_size: int = BATCH) -> WebDataset:
    """Training from shards as `data=webdataset` does it."""
    return WebDataset(
        shards=str(shards), name="loading", channels=3, image_size=size, num_classes=10, batch_size=batch_size,
        flip=True, num_workers=workers, test_fraction=0.0,
    )  # fmt: skip


def _speed(size: int, n: int, batch_size: int, seconds: float, rounds: int) -> Case:
    root = stored(n, size)
    loaders: dict[str, Callable[[], Iterable]] = {
        "torchvision ImageFolder": partial(image_folder, root, batch_size),
        "webdataset, PIL": partial(plain_webdataset, root, batch_size),
        "diffx, folder": partial(diffx_folder, root, size, batch_size),
        "diffx, shards": partial(diffx_shards, root / "jpg", size, batch_size),
        "diffx, decoded shards": partial(diffx_shards, root / "npy", size, batch_size),
        "decoding alone": partial(decoding, root, size, batch_size),
    }
    if size == 32:
        loaders["diffx, decoded, no workers"] = partial(diffx_shards, root / "npy", size, batch_size, 0)
    if find_spec("datasets") is not None:
        loaders["datasets"] = partial(hugging_face, root, batch_size)
    contenders: dict[str, Callable[[], float]] = {
        name: partial(per_image, loader, batch_size, seconds) for name, loader in loaders.items()
    }
    return Case(
        "loading, µs per image", f"{size}×{size}, {WORKERS} workers, batches of {batch_size}", contenders, rounds
    )


def per_image(loader: Callable[[], Iterable], batch_size: int, seconds: float) -> float:
    """Microseconds per image over some seconds, after the batches that may have been read ahead."""
    waiting = iter(loader())
    for _ in range(8 * WORKERS):
        next(waiting)
    started, batches = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        next(waiting)
        batches += 1
    return (time.perf_counter() - started) / (batches * batch_size) * 1e6


def forever(loader: Iterable) -> Iterable:
    """Pass after pass."""
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def image_folder(root: Path, batch_size: int) -> Iterable:
    """The loader of most image code: bytes to the device, as here."""
    images = ImageFolder(str(root / "folder"), transform=PILToTensor())
    return forever(DataLoader(images, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True))


def hugging_face(root: Path, batch_size: int) -> Iterable:
    """The `datasets` library on the same folder."""
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    images: Any = load_dataset("imagefolder", data_dir=str(root / "folder"), split="train").with_format("torch")
    return forever(DataLoader(images, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True))


def plain_webdataset(root: Path, batch_size: int) -> Iterable:
    """WebDataset as its manual shows it, without end."""
    shards = sorted(str(file) for file in (root / "jpg").glob("*.tar"))
    images = PlainWebDataset(shards, shardshuffle=100, resampled=True).shuffle(1000).decode("pil")
    batches = images.to_tuple("jpg", "cls").map_tuple(PILToTensor()).batched(batch_size, partial=False)
    return WebLoader(batches, batch_size=None, num_workers=WORKERS)


def diffx_folder(root: Path, size: int, batch_size: int) -> Iterable:
    """data=folder, too large for the memory."""
    return Folder(
        root=str(root / "folder"), cache_bytes=0, test_fraction=0.0, name="loading", channels=3, image_size=size,
        num_classes=len(list((root / "folder").iterdir())), batch_size=batch_size, flip=True, num_workers=WORKERS,
    ).train_loader(0)  # fmt: skip


def diffx_shards(shards: Path, size: int, batch_size: int, workers: int = WORKERS) -> Iterable:
    """data=webdataset."""
    return source(shards, size, workers, batch_size).train_loader(0)


class Decoding(Dataset[int]):
    """Decodes batches that are in memory, and hands nothing on: as fast as the cores can be."""

    def __init__(self, files: list[bytes], size: int, batch_size: int) -> None:
        self.files = files
        self.size = size
        self.batch_size = batch_size

    def __getitem__(self, k: int) -> int:
        for j in range(k * self.batch_size, (k + 1) * self.batch_size):
            decode_image(self.files[j % len(self.files)], "", 3, (self.size, self.size), False)
        return k


def decoding(root: Path, size: int, batch_size: int) -> Iterable:
    """Decoding alone, by the same decoder."""
    files = [file.read_bytes() for file in itertools.islice(sorted((root / "folder").rglob("*.jpg")), 1000)]
    sampler: Any = itertools.count()
    return DataLoader(Decoding(files, size, batch_size), batch_size=None, sampler=sampler, num_workers=WORKERS)


# ---- the start, memory, and very many ranks: each in a process of its own ----


def alone(*arguments: object) -> list[float]:
    """The numbers that this file prints as a script."""
    name, *words = map(str, arguments)
    if not IN_PROCESS:
        text = subprocess.check_output([sys.executable, __file__, name, *words], text=True)
    else:
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(io.StringIO()) as printed:
            SCRIPTS[name](*words)
        text = printed.getvalue()
    return [float(word) for word in text.split()]


def _first_batch(quick: bool) -> Case:
    shards = 4 if quick else 1000
    folder = many_shards(shards)

    def seconds(step: int, runs: int, forget: bool) -> float:
        for index in folder.glob("*.index.npz") if forget else []:
            index.unlink()
        with tempfile.TemporaryDirectory() as cache:
            return [alone("start", folder, step, cache)[0] for _ in range(runs)][-1]

    return Case(
        "the first batch, seconds without imports",
        f"{shards:,} shards of 1,000 images, 1 worker",
        {
            "never seen": partial(seconds, 0, 1, True),
            "with index files": partial(seconds, 0, 1, False),
            "seen before": partial(seconds, 0, 2, False),
            "resumed at sample 1,000,000": partial(seconds, 10**6 // BATCH, 2, False),
        },
        1 if quick else 3,
    )


def start(folder: str, step: str, cache_folder: str) -> None:
    """Prints the seconds from the construction of the source to its first batch."""
    os.environ["DIFFX_CACHE"] = cache_folder
    started = time.perf_counter()
    loader = source(Path(folder), 32, workers=1)
    loader.check()
    next(iter(loader.train_loader(0, start_step=int(step))))
    print(time.perf_counter() - started)


def _memory(quick: bool) -> Case:
    folder = many_shards(4 if quick else 1000)
    batches = 102 if quick else 4000
    found = cache(lambda: alone("memory", folder, batches))
    contenders: dict[str, Callable[[], float]] = {
        "after 100 batches": lambda: found()[0],
        f"after {batches:,} batches": lambda: found()[1],
    }
    return Case("memory of a reading process, MiB, mapped files not counted", f"batches of {BATCH}", contenders, 1)


def memory(folder: str, batches: str) -> None:
    """Prints MiB early and late, of a process that reads by itself."""
    loader = iter(source(Path(folder), 32, workers=0).train_loader(0))
    for k in range(int(batches)):
        next(loader)
        if k in (100, int(batches) - 1):
            print(own_memory())


def own_memory() -> float:
    """MiB of this process that are no mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@cache
def scratch() -> Path:
    """A folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="diffx-loading-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def many_shards(shards: int) -> Path:
    """Shards that all hold the same thousand images."""
    folder = scratch() / "many"
    folder.mkdir()
    shutil.copy(scratch() / "32" / "jpg" / "0000.tar", folder / "00000.tar")
    for k in range(1, shards):
        (folder / f"{k:05d}.tar").hardlink_to(folder / "00000.tar")
    return folder


def _simulated(quick: bool) -> Case:
    shards = 20 if quick else 10000
    folder = scratch() / "imagined"
    make = cache(lambda: imagine(folder, shards, most=2000))
    ranks = cache(lambda: (make(), alone("simulate", folder, scratch() / "cache"))[1])
    names = (
        "the table, once per machine",
        "a rank's first rows",
        "a rank's MiB for them",
        "all ranks' rows of a pass",
        "rows lost or doubled",
        "most less fewest rows of a worker",
    )
    contenders: dict[str, Callable[[], float]] = {
        name: partial(lambda k: ranks()[k], k) for k, name in enumerate(names)
    }
    return Case(
        "1,024 ranks of 8 workers: seconds, or as named", f"{shards:,} uneven shards, index files alone", contenders, 1
    )


def imagine(folder: Path, shards: int, most: int) -> None:
    """Index files of shards of 1 to `most` images; the shards themselves are holes of the right size."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for k in range(shards):
        n = int(draw.integers(1, most))
        path = folder / f"{k:05d}.tar"
        with path.open("wb") as hole:
            hole.truncate(2048 * n)
        keys = "".join(f"{i:06d}" for i in range(n)).encode()
        place = 2048 * np.arange(n, dtype=np.int64)[:, None] + 512
        status = path.stat()
        save_index(
            ShardIndex(
                str(path), status.st_size, status.st_mtime_ns, "0" * 32, True, ("jpg",), np.frombuffer(keys, np.uint8),
                6 * np.arange(1, n + 1), place, np.full((n, 1), 1000), np.zeros(n, np.int64),
            )
        )  # fmt: skip


def simulate(folder: str, cache_folder: str, ranks: str = "1024", workers: str = "8", batch: str = "32") -> None:
    """Prints what is named in `_simulated`; the batch is that of one rank."""
    os.environ["DIFFX_CACHE"] = cache_folder
    world, each = int(ranks), int(batch)
    data = source(Path(folder), 32, int(workers), world * each)
    started = time.perf_counter()
    data.prepare()
    print(time.perf_counter() - started)
    before = own_memory()
    started = time.perf_counter()
    data = source(Path(folder), 32, int(workers), world * each)
    order, _ = data.order(0)
    first = next(iter(GlobalBatches(world * each, 0, world - 1, world)))
    order.rows(torch.arange(first.start, first.stop))
    print(time.perf_counter() - started, own_memory() - before)
    started = time.perf_counter()
    total = len(data.split("train"))
    seen = torch.zeros(total, dtype=torch.int32)
    load = torch.zeros(world, int(workers), dtype=torch.int64)
    loaders = [iter(GlobalBatches(world * each, 0, rank, world)) for rank in range(world)]
    for step in range(-(-total // (world * each))):
        for rank, batches in enumerate(loaders):
            samples = next(batches)
            rows = order.rows(torch.arange(samples.start, min(samples.stop, total))) if samples.start < total else []
            if len(rows):
                seen[rows] += 1
                load[rank, step % int(workers)] += len(rows)
    print(time.perf_counter() - started, int((seen - 1).abs().sum()), int(load.max() - load.min()))


SCRIPTS: dict[str, Callable[..., None]] = {"start": start, "memory": memory, "simulate": simulate}

if __name__ == "__main__":
    SCRIPTS[sys.argv[1]](*sys.argv[2:])
