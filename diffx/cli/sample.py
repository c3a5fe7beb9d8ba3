"""`diffx sample`."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from diffx.cli.build import build, rescheduled
from diffx.cli.measure import best_device
from diffx.cli.trained import Task, tasks
from diffx.experiment import Run, fingerprint
from diffx.generate import Generated, Generator
from diffx.pictures import grid, png_bytes, save_trajectory, write_png
from diffx.samplers import Counted
from diffx.training.weights import load_weights
from diffx.utils import DiffxError, atomic_path

KEYS: dict[str, Any] = {"n": 100, "labels": None, "out": None, "batch_size": 256, "device": "auto", "trajectory": False}


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    # the seed of the samples, not that of the training run, is what one chooses here
    argv = [f"evaluation.{word}" if word.startswith(("seed=", "precision=")) else word for word in argv]
    found = tasks(argv, "sample", KEYS)
    if len(found) > 1 and any(task.config["out"] is not None for task in found):
        raise DiffxError(
            "out= is one place, but there are several tasks; leave it out, each then has a name of its own"
        )
    for task in found:
        sample(task)
    return 0


def sample(task: Task) -> None:
    """Samples a run and writes the images."""
    console, config, run = Console(), task.config, task.run
    out = _destination(config, run)
    labels = config["labels"]
    arm = build(config)
    announce(config, console)
    for label in labels or []:
        arm.module.conditioner.check(label)
    denoiser, _ = load_weights(arm.module.ema, config["weights"], run.weights.parent, run.newest_checkpoint()[0])
    device = torch.device(device_of(config))
    generator = arm.generator(denoiser.to(device).eval())
    counted = Counted(generator.denoiser)
    number = _write(replace(generator, denoiser=counted), config, device, out, console)
    nfe = counted.samples / number if generator.nfe is None else generator.nfe
    console.print(f"{number} samples, NFE {nfe:.4g}: {out}", highlight=False, soft_wrap=True)


def announce(config: dict[str, Any], console: Console) -> None:
    """Says what is converted where a model is sampled on another schedule than it was trained on."""
    if rescheduled(config):
        trained, asked = (config[key]["_target_"].split(".")[2:] for key in ("trained_schedule", "schedule"))
        console.print(
            f"trained on schedule {'.'.join(trained)}, sampled on {'.'.join(asked)} at equal logSNR", highlight=False
        )


def device_of(config: dict[str, Any]) -> str:
    """The device to sample on.

    Raises:
        DiffxError: if torch does not know it or does not see it.
    """
    if config["device"] == "auto":
        return best_device("auto")
    try:
        torch.zeros(1, device=config["device"])
    except (RuntimeError, AssertionError) as error:
        raise DiffxError(f"device={config['device']} cannot be used here; set device=cpu or device=auto") from error
    return config["device"]


def _destination(config: dict[str, Any], run: Run) -> Path:
    if config["out"] is None:
        keys = ("sampler", "discretization", "guidance", "thresholding", "schedule", "weights", "n", "labels")
        settings = {key: config[key] for key in keys} | {"seed": config["evaluation"]["seed"]}
        if config["evaluation"].get("precision", "32-true") != "32-true":
            settings["precision"] = config["evaluation"]["precision"]
        digest = fingerprint(settings)
        return run.samples / f"{'trajectory' if config['trajectory'] else 'samples'}-{digest}.png"
    out = Path(config["out"]).expanduser()
    if out.suffix not in ("", ".png", ".npz", ".tar"):
        raise DiffxError(f"out={out} is neither .png, .npz, .tar nor a folder; choose one of them")
    if config["trajectory"] and out.suffix != ".png":
        raise DiffxError(f"trajectory=true draws a picture; let out={out} end in .png")
    if out.suffix == "" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffxError(f"out={out} exists and is not an empty folder; choose another")
    return out


def _write(generator: Generator, config: dict[str, Any], device: torch.device, out: Path, console: Console) -> int:
    """Samples and writes batch by batch; returns the number of samples."""
    if config["trajectory"]:
        index = torch.arange(min(config["n"], 10), device=device)
        save_trajectory(generator, out, index, _labels(config, index))
        return len(index)
    with (
        _WRITERS[out.suffix](out, config["n"]) as write,
        _behind(write) as write_behind,
        Progress(console=console, disable=not sys.stdout.isatty(), transient=True) as bar,
    ):
        task = bar.add_task("sample", total=config["n"])
        for made in generator.batches(config["n"], config["batch_size"], device, labels=config["labels"]):
            write_behind(made)
            bar.advance(task, len(made.index))
    return config["n"]


def _labels(config: dict[str, Any], index: Tensor) -> Tensor | None:
    if config["labels"] is None:
        return None
    return torch.tensor(config["labels"], device=index.device)[index % len(config["labels"])]


Write = Callable[[Generated], None]


@contextmanager
def _behind(write: Write) -> Iterator[Write]:
    """Writes each batch in a thread while the next one is sampled; one waits at most, and what fails is raised here.

    What has been handed over is written to its end, whatever happens meanwhile.
    """
    last: Future[None] | None = None
    with ThreadPoolExecutor(1) as thread:

        def hand_over(made: Generated) -> None:
            nonlocal last
            batch = Generated(*(value.cpu() for value in made))  # here, so that the thread never waits for the device
            if last is not None:
                last.result()
            last = thread.submit(write, batch)

        yield hand_over
        if last is not None:
            last.result()


@contextmanager
def _png(out: Path, n: int) -> Iterator[Write]:
    """One grid."""
    images: list[Tensor] = []
    yield lambda made: images.append(made.images.cpu())
    write_png(grid(torch.cat(images), max(1, round(n**0.5))), out)


@contextmanager
def _npz(out: Path, n: int) -> Iterator[Write]:
    """`arr_0` of shape `[N, H, W, C]`, as ADM's evaluation suite reads it, and `label`."""
    images: list[Tensor] = []
    labels: list[Tensor] = []

    def write(made: Generated) -> None:
        images.append(made.images.permute(0, 2, 3, 1).cpu())
        labels.append(made.label.cpu())

    yield write
    with atomic_path(out) as temporary:
        np.savez(temporary, arr_0=torch.cat(images).numpy(), label=torch.cat(labels).numpy())


@contextmanager
def _folder(out: Path, n: int) -> Iterator[Write]:
    """One PNG each."""
    digits = len(str(n - 1))

    def write(made: Generated) -> None:
        for k, image, label in zip(made.index.tolist(), made.images, made.label.tolist(), strict=True):
            write_png(image, out / f"{k:0{digits}d}-class{label}.png")

    yield write


@contextmanager
def _tar(out: Path, n: int) -> Iterator[Write]:
    """A WebDataset shard: `<number>.png` and `<number>.cls`."""
    import webdataset as wds  # slow to import

    with atomic_path(out) as temporary, wds.writer.TarWriter(str(temporary), mtime=0) as shard:

        def write(made: Generated) -> None:
            for k, image, label in zip(made.index.tolist(), made.images, made.label.tolist(), strict=True):
                shard.write({"__key__": f"{k:08d}", "png": png_bytes(image), "cls": label})

        yield write


_WRITERS: dict[str, Callable[[Path, int], AbstractContextManager[Write]]] = {
    ".png": _png,
    ".npz": _npz,
    ".tar": _tar,
    "": _folder,
}
