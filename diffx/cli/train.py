"""`diffx train`."""

import os
import signal
import socket
import subprocess
import sys
import time
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
    if run.state == "finished":
        run.freeze(config)
        console.print(f"[bold]{run.path}[/] is finished; delete it to train again", highlight=False)
        return summarize(arm, run, console)
    check(arm)
    with run.lock():
        run.freeze(config)
        Record.now(command_line()).append_to(run.path)
        console.print(f"[bold]{run.path}[/]\n{arm.source.describe()}", highlight=False, soft_wrap=True)
        trainer = config["trainer"]
        if trainer["devices"] * trainer["num_nodes"] > 1 and "WORLD_SIZE" not in os.environ:
            return launch_ranks(run, trainer)
        return execute(arm, run, console)


def launch_ranks(run: Run, trainer: dict[str, Any]) -> int:
    """One process per device on this node, all starting from the run's frozen config; returns the exit code.

    Signals go on to the ranks, which save together. A rank that fails takes the others with it: they would wait for it
    for ever.

    Raises:
        DiffxError: for more than one node.
    """
    if trainer["num_nodes"] > 1:
        raise DiffxError(
            f"trainer.num_nodes={trainer['num_nodes']} needs a process per device on every node; start each with "
            f"torchrun or srun as: python -m diffx.cli.rank {run.path}"
        )
    count = trainer["devices"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # how Lightning knows processes that others have started; one thread each unless the user says otherwise
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "diffx.cli.rank", str(run.path)]
    ranks = [subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(k)}) for k in range(count)]

    def forward(number: int, frame: Any) -> None:
        # a terminal has sent INT to the ranks already
        for rank in ranks if number != signal.SIGINT else []:
            rank.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    previous = [signal.signal(number, forward) for number in numbers]
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
        # 128 and more: stopped by a signal, and saving together
        if any(0 < (rank.poll() or 0) < 128 or (rank.poll() or 0) < 0 for rank in ranks):
            _end(ranks)
    for number, handler in zip(numbers, previous, strict=True):
        signal.signal(number, handler)
    codes = [rank.returncode for rank in ranks]
    return max((code if code >= 0 else 128 - code) for code in codes)


def _end(ranks: list[subprocess.Popen[bytes]], grace: float = 10.0) -> None:
    """Gives the ranks time to end by themselves, then kills them."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.wait()


def _budget(config: DictConfig) -> None:
    """Turns a budget of images into one of steps, before anything is interpolated from it."""
    training = config.training
    if training.max_images is not None:
        if not isinstance(training.max_images, int) or not isinstance(config.data.batch_size, int):
            raise DiffxError("training.max_images and data.batch_size must be whole numbers")
        training.max_steps = max(1, training.max_images // config.data.batch_size)
    if training.max_steps is None:
        raise DiffxError("nothing says how long to train; set training.max_steps=… or training.max_images=…")
