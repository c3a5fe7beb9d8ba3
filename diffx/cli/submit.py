"""`launcher=slurm`: from checked arms to one array job, without waiting for it."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from diffx.cli.build import build, check, make
from diffx.cli.jobs import states, table
from diffx.experiment import Record, Run, find_runs, fingerprint, identity
from diffx.experiment.record import command_line
from diffx.launch import Ledger, Slurm
from diffx.launch.array import submit_array
from diffx.launch.scheduler import available, queue
from diffx.utils import DiffxError

Config = dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """An arm to submit.

    Arguments:
        run: its directory.
        config: its config.
    """

    run: Run
    config: Config


def submit(arms: Sequence[tuple[Run, Config]]) -> int:
    """Submits what is neither finished nor queued nor running; returns the exit code.

    Arguments:
        arms: run directory and config of each.

    Raises:
        DiffxError: if an arm cannot work, sbatch refuses or there is none; nothing has been submitted then.
    """
    console = Console()
    if not available():
        raise DiffxError(
            "there is no sbatch here; submit from a login node of the cluster, or leave launcher=slurm out"
        )
    runs = {str(run.path): (run, config) for run, config in arms}
    for _, config in runs.values():
        make(config, "launcher")  # says what is impossible before anything else is done
    waiting = _waiting(list(runs.values()), console)
    _check([arm.config for arm in waiting])
    for arm in waiting:
        with arm.run.lock():
            arm.run.freeze(arm.config)
            Record.now(command_line()).append_to(arm.run.path)
    # one array for all that ask for the same: usually one
    alike: dict[str, list[Waiting]] = {}
    for arm in waiting:
        trainer = arm.config["trainer"]
        alike.setdefault(fingerprint([arm.config["launcher"], trainer["devices"]]), []).append(arm)
    for group in alike.values():
        _submit(group, console)
    found = [run for run, _ in runs.values()]
    root = Path(next(iter(runs.values()))[1]["runs_dir"])
    console.print(f"\nwatch them:  diffx jobs {root}", highlight=False, soft_wrap=True)
    if any(config["launcher"]["wait"] for _, config in runs.values()):
        return watch(found, console)
    return 0


def watch(runs: Sequence[Run], console: Console, seconds: float = 5.0) -> int:
    """Shows the arms until none is queued or running; 0 if all have finished, otherwise 2.

    Ctrl-C ends the watching and leaves the jobs alone.
    """
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            found = states(runs)
            live.update(table(found), refresh=True)
            if not any(state.live for state in found):
                return 0 if all(state.name == "finished" for state in found) else 2
            time.sleep(seconds)
    console.print("no longer watching; the jobs go on", highlight=False)
    return 0


def _waiting(runs: list[tuple[Run, Config]], console: Console) -> list[Waiting]:
    """The arms that nothing is being done about; says what becomes of the others."""
    jobs = {str(run.path): Ledger(run.path).job for run, _ in runs}
    live = {key for key, job in queue(jobs.values()).items() if job.live}
    waiting = []
    for run, config in runs:
        if run.state == "finished":
            console.print(f"{run.path} is finished", highlight=False, soft_wrap=True)
        elif jobs[str(run.path)] in live:
            console.print(f"{run.path} is job {jobs[str(run.path)]} already", highlight=False, soft_wrap=True)
        else:
            waiting.append(Waiting(run, config))
    return waiting


def _check(configs: Sequence[Config]) -> None:
    """Builds and checks one seed of each arm."""
    seen = set()
    for config in configs:
        key = fingerprint(identity(config) | {"evaluation": config["evaluation"], "extractor": config["extractor"]})
        if key not in seen:
            seen.add(key)
            check(build(config), here=False)


def _hours(arms: Sequence[Waiting], slurm: Slurm) -> str:
    """What training takes altogether, by the speed that runs of the same kind have logged.

    A login node is no place to try it out.
    """
    speeds: dict[str, float] = {}
    for run in find_runs(*{arm.run.path.parents[1] for arm in arms}):
        if speed := run.latest().get("images_per_second"):
            speeds[_kind(run.config())] = speed
    known = [(arm, speeds[_kind(arm.config)]) for arm in arms if _kind(arm.config) in speeds]
    if len(known) < len(arms):
        return "no run like these has logged its speed yet: diffx plan estimates hours"
    hours = 0.0
    for arm, speed in known:
        left = arm.config["training"]["max_steps"] - arm.run.latest().get("step", 0)
        hours += left * arm.config["data"]["batch_size"] / speed / 3600
    devices = slurm.nodes * slurm.gpus or slurm.nodes * arms[0].config["trainer"]["devices"]
    unit = "GPU" if slurm.gpus else "process"
    return f"about {hours * devices:.2g} {unit}-hours of training, by the speed of earlier runs"


def _kind(config: Config) -> str:
    """What the speed of training depends on."""
    trainer = {key: config["trainer"][key] for key in ("accelerator", "devices", "num_nodes", "compile")}
    return fingerprint([config["backbone"], config["data"]["batch_size"], config["training"]["precision"], trainer])


def _submit(arms: Sequence[Waiting], console: Console) -> None:
    config = arms[0].config
    slurm: Slurm = make(config, "launcher")
    tasks = config["trainer"]["devices"]
    each = f"{slurm.nodes} × {slurm.gpus} GPUs" if slurm.gpus else f"{slurm.nodes} × {tasks} CPU processes"
    limit = f", time limit {slurm.time} for each start" if slurm.time is not None else ""
    total = f"{len(arms)} arm{'s' if len(arms) > 1 else ''} on {each}{limit}"
    job = submit_array([arm.run for arm in arms], slurm, tasks, Path(config["runs_dir"]) / ".slurm", f"diffx: {total}.")
    console.print(f"[bold]job {job}[/]: {total}; {_hours(arms, slurm)}", highlight=False, soft_wrap=True)
    for k, arm in enumerate(arms):
        console.print(f"  {f'{job}_{k}' if len(arms) > 1 else job}  {arm.run.path}", highlight=False, soft_wrap=True)
