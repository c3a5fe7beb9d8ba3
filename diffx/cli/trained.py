"""What `sample` and `evaluate` share: the config of a trained run with other inference settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from diffx.cli.compose import Arguments, compose_config, multirun, parse, refuse_sweep
from diffx.experiment import Run
from diffx.experiment.identity import INFERENCE
from diffx.utils import DiffxError

GROUPS = sorted(INFERENCE - {"evaluation"} | {"schedule"})
"""What can be chosen anew: the schedule too, since a denoiser is a denoiser at equal logSNR on any schedule."""


def run_command(argv: list[str], name: str, extra: dict[str, Any], task: Callable[[dict[str, Any], Run], int]) -> int:
    """Runs a command on a trained run, or on each point of a sweep.

    Arguments:
        argv: what was typed after the command.
        name: the command.
        extra: keys of the command itself, with their defaults.
        task: does it, given the config and the run; returns the exit code.

    Raises:
        DiffxError: for every mistake, in one sentence.
    """
    arguments = parse(argv)
    chosen = [o for o in arguments.overrides if o.startswith("run=")]
    if len(chosen) != 1:
        raise DiffxError(f"name one trained run: diffx {name} run=DIR, the folder that diffx train printed")
    run = Run(Path(chosen[0].removeprefix("run=").strip("'\"")).expanduser())
    register(name, run, extra)
    rest = [o for o in arguments.overrides if not o.startswith("run=")]

    def config_of(point: list[str]) -> dict[str, Any]:
        return compose_config(f"diffx_{name}", point, arguments.config_dirs)

    if arguments.multirun:
        points = Arguments(rest, True, False, arguments.config_dirs)
        return multirun(f"diffx_{name}", config_of, lambda point: task(config_of(point), run), points)
    refuse_sweep(rest)
    return task(config_of(rest), run)


def register(name: str, run: Run, extra: dict[str, Any]) -> None:
    """Makes the run's frozen config a primary config of Hydra, whose inference groups can be chosen anew.

    The run's own choice of each group is an option named `run`, the default.
    """
    frozen = run.config()
    store = ConfigStore.instance()
    for group in GROUPS:
        store.store(name="run", group=group, node=DictConfig(frozen[group]))
    primary = {key: value for key, value in frozen.items() if key not in GROUPS}
    defaults: list[Any] = [{group: "run"} for group in GROUPS]
    primary |= {"defaults": [*defaults, "_self_"], "trained_schedule": frozen["schedule"], **extra}
    store.store(name=f"diffx_{name}", node=DictConfig(primary))
