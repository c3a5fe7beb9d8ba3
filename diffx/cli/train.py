"""`diffx train`."""

import os
import subprocess
import sys
from typing import Any

import yaml
from omegaconf import DictConfig
from rich.console import Console

from diffx.cli.compose import Arguments, compose_config, multirun, parse, refuse_sweep
from diffx.experiment import Record, Run, locate
from diffx.experiment.record import command_line
from diffx.utils import DiffxError


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    if arguments.show:
        print(yaml.safe_dump(config_of(arguments.overrides, arguments), sort_keys=False, allow_unicode=True), end="")
        return 0
    if arguments.multirun:
        return multirun(
            "train",
            lambda point: config_of(point, arguments),
            lambda point: train(config_of(point, arguments), point),
            arguments,
        )
    refuse_sweep(arguments.overrides)
    return train(config_of(arguments.overrides, arguments), arguments.overrides)


def config_of(overrides: list[str], arguments: Arguments) -> dict[str, Any]:
    """The resolved config of one arm."""
    return compose_config("train", overrides, arguments.config_dirs, _budget)


def train(config: dict[str, Any], overrides: list[str]) -> int:
    """Trains, resumes or recognises one arm, then evaluates it; returns the exit code."""
    # heavy imports after composing, so that a misspelt key is answered at once
    from diffx.cli.build import build, check
    from diffx.cli.execute import execute, summarize

    console = Console()
    arm = build(config)
    run = locate(config["runs_dir"], config, overrides)
    finished = run.state == "finished"
    if not finished:
        check(arm)
    run.freeze(config)
    Record.now(command_line()).append_to(run.path)
    if finished:
        console.print(f"[bold]{run.path}[/] is finished; delete it to train again", highlight=False)
        return summarize(arm, run, console)
    console.print(f"[bold]{run.path}[/]\n{arm.source.describe()}", highlight=False)
    trainer = config["trainer"]
    if trainer["devices"] * trainer["num_nodes"] > 1 and "WORLD_SIZE" not in os.environ:
        return launch_ranks(run, trainer)
    return execute(arm, run, console)


def launch_ranks(run: Run, trainer: dict[str, Any]) -> int:
    """One process per device on this node, all starting from the run's frozen config; returns the exit code."""
    if trainer["num_nodes"] > 1:
        raise DiffxError(
            f"trainer.num_nodes={trainer['num_nodes']} needs a process per device on every node; start each with "
            f"torchrun or srun as: python -m diffx.cli.rank {run.path}"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={trainer['devices']}"]
    # torchrun's default of one thread per process, said aloud, unless the user has chosen
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen([*command, "-m", "diffx.cli.rank", str(run.path)], env=environment)
    while True:
        try:
            process.wait()
            break
        except KeyboardInterrupt:  # the ranks got it too, and are saving
            continue
    status = run.status()
    if status.get("state") == "interrupted":
        return 128 + int(status["signal"])
    return 0 if process.returncode == 0 else 2


def _budget(config: DictConfig) -> None:
    """Turns a budget of images into one of steps, before anything is interpolated from it."""
    training = config.training
    if training.max_images is not None:
        if not isinstance(training.max_images, int) or not isinstance(config.data.batch_size, int):
            raise DiffxError("training.max_images and data.batch_size must be whole numbers")
        training.max_steps = max(1, training.max_images // config.data.batch_size)
    if training.max_steps is None:
        raise DiffxError("nothing says how long to train; set training.max_steps=… or training.max_images=…")
