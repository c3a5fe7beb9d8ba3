"""`diffx evaluate`."""

from typing import Any

import torch
from rich.console import Console

from diffx.cli import execute
from diffx.cli.build import build
from diffx.cli.sample import announce, device_of
from diffx.cli.trained import run_command
from diffx.experiment import Run
from diffx.training.fit import load_weights
from diffx.utils import DiffxError


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return run_command(argv, "evaluate", {"device": "auto"}, evaluate)


def evaluate(config: dict[str, Any], run: Run) -> int:
    """Measures a run, prints the table and returns the exit code."""
    console = Console()
    if config["evaluation"]["num_samples"] < 1:
        raise DiffxError("evaluation.num_samples is 0; set evaluation.num_samples=N to evaluate")
    arm = build(config)
    announce(config, console)
    arm.source.check()
    denoiser = arm.module.ema.denoiser
    load_weights(denoiser, run.weights, run.newest_checkpoint()[0])
    evaluation, file = execute.evaluate(arm, run, denoiser, console, torch.device(device_of(config)))
    console.print(execute.table(evaluation))
    console.print(f"evaluation  {file}", highlight=False, soft_wrap=True)
    return 0
