"""`diffx sample`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from diffx.cli.build import Arm, build, rescheduled
from diffx.cli.execute import best_device
from diffx.cli.trained import run_command
from diffx.experiment import Run, fingerprint
from diffx.generate import Generator
from diffx.pictures import grid, write_png
from diffx.training.fit import load_weights
from diffx.utils import DiffxError, atomic_path

KEYS: dict[str, Any] = {"n": 100, "labels": None, "out": None, "batch_size": 256, "device": "auto"}


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    # the seed of the samples, not that of the training run, is what one chooses here
    argv = [f"evaluation.{word}" if word.startswith("seed=") else word for word in argv]
    return run_command(argv, "sample", KEYS, sample)


def sample(config: dict[str, Any], run: Run) -> int:
    """Samples a run and writes the images; returns the exit code."""
    console = Console()
    out = _destination(config, run)
    labels = config["labels"]
    arm = build(config)
    announce(config, console)
    for label in labels or []:
        arm.module.conditioner.check(label)
    load_weights(arm.module.ema.denoiser, run.weights, run.newest_checkpoint()[0])
    device = torch.device(device_of(config))
    generator = arm.generator(arm.module.ema.denoiser.to(device).eval())
    images, label = _images(generator, config, device, console)
    _write(images, label, out, arm)
    console.print(f"{len(images)} samples, NFE {generator.nfe}: {out}", highlight=False, soft_wrap=True)
    return 0


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


def _images(
    generator: Generator, config: dict[str, Any], device: torch.device, console: Console
) -> tuple[Tensor, Tensor]:
    choice = None if config["labels"] is None else torch.tensor(config["labels"], device=device)
    images, labels = [], []
    with Progress(console=console, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("sample", total=config["n"])
        for index in torch.arange(config["n"], device=device).split(config["batch_size"]):
            label = None if choice is None else choice[index % len(choice)]
            made = generator(index, label)
            images.append(made.images.cpu())
            labels.append(made.label.cpu())
            bar.advance(task, len(index))
    return torch.cat(images), torch.cat(labels)


def _destination(config: dict[str, Any], run: Run) -> Path:
    if config["out"] is None:
        asked = {key: config[key] for key in ("sampler", "discretization", "guidance", "thresholding", "n", "labels")}
        return run.samples / f"samples-{fingerprint(asked | {'seed': config['evaluation']['seed']})}.png"
    out = Path(config["out"]).expanduser()
    if out.suffix not in ("", ".png", ".npz"):
        raise DiffxError(f"out={out} is neither .png, .npz nor a folder; choose one of them")
    if out.suffix == "" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffxError(f"out={out} exists and is not an empty folder; choose another")
    return out


def _write(images: Tensor, label: Tensor, out: Path, arm: Arm) -> None:
    if out.suffix == ".png":
        write_png(grid(images, max(1, round(len(images) ** 0.5))), out)
    elif out.suffix == ".npz":
        # arr_0 of shape [N, H, W, C], as ADM's evaluation suite reads it
        with atomic_path(out) as temporary:
            np.savez(temporary, arr_0=images.permute(0, 2, 3, 1).numpy(), label=label.numpy())
    else:
        digits = len(str(len(images) - 1))
        for k, image in enumerate(images):
            write_png(image, out / f"{k:0{digits}d}-class{int(label[k])}.png")
