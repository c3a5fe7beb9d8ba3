"""`diffx train`."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from omegaconf import DictConfig
from rich.console import Console

from diffx.cli.budget import set_steps, steps_of_flops
from diffx.cli.compose import Arguments, compose_config, multirun, parse, refuse_sweep, sweep_points
from diffx.cli.grid import two_stages, without
from diffx.cli.launch import launch
from diffx.experiment import Record, Run, is_identity, locate
from diffx.experiment.identity import INFERENCE
from diffx.experiment.record import command_line
from diffx.utils import DiffxError

Report = Callable[[int, Mapping[str, float]], bool]


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    if arguments.show:
        print(yaml.safe_dump(config_of(arguments.overrides, arguments), sort_keys=False, allow_unicode=True), end="")
        return 0
    if "sweeper=optuna" in arguments.overrides and "launcher=slurm" not in arguments.overrides:
        from diffx.cli.optimize import optimize

        return optimize(arguments)
    if arguments.multirun:
        arguments = two_stages(arguments)
    else:
        refuse_sweep(arguments.overrides)
    if "launcher=slurm" in arguments.overrides:
        return _submit(arguments)
    if arguments.multirun:
        return multirun(
            "train",
            lambda point: config_of(point, arguments),
            lambda point: _task(config_of(point, arguments), point),
            arguments,
        )
    return train(config_of(arguments.overrides, arguments), arguments.overrides)


def config_of(overrides: list[str], arguments: Arguments) -> dict[str, Any]:
    """The resolved config of one arm.

    Raises:
        DiffxError: for every mistake, in one sentence.
    """
    config = compose_config("train", overrides, arguments.config_dirs, prepare)
    if config["training"]["max_flops"] is not None:
        overrides = [*overrides, f"training.max_steps={steps_of_flops(config)}"]
        config = compose_config("train", overrides, arguments.config_dirs, prepare)
    # ranks and resumed runs start from the frozen config: what the further points mean is settled here
    config["evaluation"]["interim_points"] = {
        point: _inference(point, "interim", overrides, arguments, INFERENCE - {"evaluation", "extractor", "metrics"})
        for point in config["evaluation"]["interim"]
    }
    config["evaluation"]["final_points"] = {
        point: _differing(_inference(point, "final", overrides, arguments, INFERENCE | {"choices"}), config)
        for point in config["evaluation"]["final"]
    }
    return config


def _inference(point: str, where: str, overrides: list[str], arguments: Arguments, keys: set[str]) -> dict[str, Any]:
    """Some keys of a config with the further overrides of one point."""
    more = point.split()
    for override in more:
        if is_identity(override.partition("=")[0]):
            raise DiffxError(
                f"evaluation.{where} holds '{override}', which changes the model; name inference settings only, such "
                "as sampler=ddim, sampler.steps=10, guidance.scale=2 or weights=ema_0.99"
            )
    rest = [o for o in overrides if not o.startswith(("evaluation.interim=", "evaluation.final="))]
    config = compose_config("train", [*without(rest, more), *more], arguments.config_dirs, prepare)
    return {key: config[key] for key in sorted(keys)}


def _differing(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What of some settings is not as in a config: a frozen config is read by people too."""
    lists = ("interim", "interim_points", "final", "final_points")
    evaluation = {key: value for key, value in config["evaluation"].items() if key not in lists}
    asked = settings | {"evaluation": {k: v for k, v in settings["evaluation"].items() if k not in lists}}
    return {key: value for key, value in asked.items() if value != (config | {"evaluation": evaluation})[key]}


def _submit(arguments: Arguments) -> int:
    """Every arm into SLURM's queue."""
    from diffx.cli.submit import submit

    overrides = arguments.overrides
    sweeper = next((o for o in overrides if o.startswith(("sweeper=optuna", "hydra/sweeper=", "hydra.sweeper"))), None)
    if sweeper is not None:
        raise DiffxError(
            f"'{sweeper}' needs results before it goes on, and launcher=slurm waits for none; leave one out"
        )
    points = sweep_points(overrides, "train", arguments) if arguments.multirun else [overrides]
    configs = [config_of(point, arguments) for point in points]
    return submit(
        [(locate(config["runs_dir"], config, point), config) for config, point in zip(configs, points, strict=True)]
    )


def _task(config: dict[str, Any], overrides: list[str]) -> int:
    """An arm in a process that a launcher of Hydra has started."""
    code = train(config, overrides)
    # submitit would take a run that has stopped and saved for one that is done
    if code >= 128 and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        from diffx.launch.ledger import job_id
        from diffx.launch.scheduler import requeue

        requeue(job_id())
    return code


def train(config: dict[str, Any], overrides: list[str], report: Report | None = None) -> int:
    """Trains, resumes or recognises one arm, then evaluates it; returns the exit code.

    Arguments:
        config: the resolved config.
        overrides: what was typed, by which a new run directory is named.
        report: is told the metrics in training and may stop it, in one process.
    """
    # heavy imports after composing, so that a misspelt key is answered at once
    from diffx.cli.build import build, check, make
    from diffx.cli.execute import execute, summarize
    from diffx.cli.measure import best_device
    from diffx.cli.switches import switch_on

    console = Console()
    arm = build(config)
    run = locate(config["runs_dir"], config, overrides)
    if run.state == "finished":
        run.freeze(config)
        console.print(f"[bold]{run.path}[/] is finished; delete it to train again", highlight=False, soft_wrap=True)
        switch_on(arm.module, config["trainer"], best_device(config["trainer"]["accelerator"]), training=False)
        return summarize(arm, run, console)
    check(arm)
    with run.lock():
        run.freeze(config)
        Record.now(command_line()).append_to(run.path)
        console.print(f"[bold]{run.path}[/]\n{arm.source.describe()}", highlight=False, soft_wrap=True)
        trainer = config["trainer"]
        if config["launcher"]:
            return _in_job(run, trainer["devices"] * trainer["num_nodes"], make(config, "launcher"))
        if trainer["devices"] * trainer["num_nodes"] > 1 and "WORLD_SIZE" not in os.environ:
            if trainer["num_nodes"] > 1:
                raise DiffxError(
                    f"trainer.num_nodes={trainer['num_nodes']} needs a process per device on every node; submit with "
                    "launcher=slurm, use launcher=srun inside a job, or start each by torchrun as: python -m "
                    f"diffx.cli.rank {run.path}"
                )
            ranks = ["-m", "diffx.cli.rank", str(run.path), str(run.resume_from() or "")]
            return launch(ranks, trainer["devices"])
        return execute(arm, run, console, run.resume_from(), report)


def _in_job(run: Run, tasks: int, launcher: Any) -> int:
    """A process per device by srun, from the frozen config."""
    from diffx.launch import supervise

    command = [sys.executable, "-m", "diffx.cli.rank", str(run.path), str(run.resume_from() or "")]
    return supervise(run, command, tasks, launcher.srun, launcher.retries)


def prepare(config: DictConfig) -> None:
    """What follows from other settings, before anything is interpolated from it."""
    set_steps(config)
    config.setdefault("metrics", {})  # metrics=[] leaves no trace
    # nodes and GPUs are asked for once
    launcher, trainer = config.launcher, config.trainer
    nodes, gpus = launcher.get("nodes"), launcher.get("gpus")
    if isinstance(nodes, int) and isinstance(gpus, int) and nodes > 0 and gpus >= 0:  # else the launcher says it
        trainer.num_nodes = launcher.nodes
        trainer.accelerator = "gpu" if launcher.gpus else "cpu"
        trainer.devices = launcher.gpus or trainer.devices
    elif "srun" in launcher and "SLURM_JOB_ID" in os.environ:
        trainer.num_nodes = int(os.environ.get("SLURM_NNODES", "1"))
        trainer.devices = int(os.environ.get("SLURM_NTASKS", "1")) // trainer.num_nodes
