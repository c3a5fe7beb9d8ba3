"""`diffx learn-times`."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffx.cli.build import build
from diffx.cli.sample import announce, device_of
from diffx.cli.trained import tasks
from diffx.discretizations.learned import save
from diffx.learn_discretization import learn_discretization
from diffx.training.weights import load_weights
from diffx.utils import DiffxError, Keys

KEYS: dict[str, Any] = {"n": 256, "iterations": 20, "out": None, "device": "auto", "batch_size": 256}

_SEED = 2**31 - 1  # other noise than any evaluation's: times fitted to its samples would flatter them


def main(argv: list[str]) -> int:
    """Finds times for a trained run, saves them and says what they gain; returns the exit code."""
    (task, *others) = tasks(argv, "learn_times", KEYS)
    if others:
        raise DiffxError("times are learned for one run, sampler and number of steps at a time; name one of each")
    config, run, console = task.config, task.run, Console()
    steps = config["sampler"]["steps"]
    name = config["sampler"]["_target_"].rpartition(".")[2].lower()
    out = Path(config["out"] or run.path / "times" / f"{name}-{steps}.json").expanduser()
    if out.suffix != ".json":
        raise DiffxError(f"out={out} must end in .json")
    if config["n"] < 4:
        raise DiffxError(f"n={config['n']} samples are too few to fit times to and to measure them on; set n=256")
    device = torch.device(device_of(config))
    arm = build(config)
    announce(config, console)
    denoiser, _ = load_weights(arm.module.ema, config["weights"], run.weights.parent, run.newest_checkpoint()[0])
    generator = arm.generator(denoiser.to(device).eval())
    index = torch.arange(config["n"], device=device)
    noise = Keys(_SEED, index).normal("sample", *generator.shape)
    cond = generator.conditioner({"label": generator.labels(index)})
    with console.status(f"learning {steps} times of {name} on {config['n']} samples"):
        found = learn_discretization(
            generator.denoiser,
            generator.sampler,
            noise,
            steps,
            iterations=config["iterations"],
            batch_size=config["batch_size"],
            **cond,
        )
    save(out, found.logsnr, found.report | {"run": str(run.path), "weights": config["weights"]})
    errors: dict[str, float] = found.report["rms"]
    shown = Table(
        title=f"{name}, {steps} steps: distance to the exact solution",
        caption="root mean square per dimension, on samples that the search has not seen",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("times")
    shown.add_column("error", justify="right")
    shown.add_column("over the learned", justify="right")
    for grid, error in sorted(errors.items(), key=lambda item: item[1]):
        shown.add_row(grid, f"{error:.4g}", f"{error / errors['learned']:.2f} ×")
    console.print(shown)
    console.print(
        f"times  {out}\nuse them: diffx evaluate run={run.path} sampler.steps={steps} discretization=learned "
        f"discretization.path={out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
