"""What `sample` and `evaluate` share: the config of a trained run with other inference settings."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from diffx.cli.compose import compose_config, parse, refuse_sweep, sweep_points
from diffx.experiment import Run
from diffx.experiment.identity import INFERENCE
from diffx.utils import DiffxError

GROUPS = sorted(INFERENCE - {"evaluation", "weights"} | {"schedule"})
"""What can be chosen anew: the schedule too, since a denoiser is a denoiser at equal logSNR on any schedule."""


@dataclass(frozen=True)
class Task:
    """A trained run with the settings to sample or measure it with.

    Arguments:
        run: the run.
        overrides: what was typed for this point of the sweep.
        config: the run's config with these settings.
    """

    run: Run
    overrides: list[str]
    config: dict[str, Any]


def tasks(argv: list[str], name: str, extra: dict[str, Any]) -> list[Task]:
    """Every run at every point of the sweep, composed and checked before the first starts.

    Arguments:
        argv: what was typed after the command.
        name: the command.
        extra: keys of the command itself, with their defaults.

    Raises:
        DiffxError: for every mistake, in one sentence.
    """
    arguments = parse(argv)
    chosen = [o.removeprefix("run=") for o in arguments.overrides if o.startswith("run=")]
    if not chosen:
        raise DiffxError(f"name a trained run: diffx {name} run=DIR, the folder that diffx train printed")
    rest = [o for o in arguments.overrides if not o.startswith("run=")]
    points = [rest]
    if arguments.multirun:
        # in one process: they share the model, the extractor and the reference statistics
        other = next((o for o in rest if o.startswith("hydra")), None)
        if other is not None:
            raise DiffxError(f"'{other}' has no effect here: all points of this sweep run in one process; leave it out")
        points = sweep_points(rest, f"diffx_{name}", arguments)
    else:
        refuse_sweep(rest)
    found = []
    for run in _runs(chosen):
        register(name, run, extra)
        for point in points:
            found.append(Task(run, point, compose_config(f"diffx_{name}", point, arguments.config_dirs)))
    return found


def register(name: str, run: Run, extra: dict[str, Any]) -> None:
    """Makes the run's frozen config a primary config of Hydra, whose inference groups can be chosen anew.

    The run's own choice of each group is an option named `run`, the default.
    """
    frozen = run.config()
    frozen["evaluation"].setdefault("precision", "32-true")  # a config of an older run has no choice
    store = ConfigStore.instance()
    for group in GROUPS:
        store.store(name="run", group=group, node=OmegaConf.create(frozen[group]))
    primary = {key: value for key, value in frozen.items() if key not in GROUPS}
    defaults: list[Any] = [{group: "run"} for group in GROUPS]
    primary |= {"defaults": [*defaults, "_self_"], "trained_schedule": frozen["schedule"], **extra}
    store.store(name=f"diffx_{name}", node=OmegaConf.create(primary))


def _runs(chosen: list[str]) -> list[Run]:
    """The runs that `run=DIR`, `run=DIR,DIR` and `run=runs/*/seed*` name."""
    found: dict[Path, Run] = {}
    for word in (word for words in chosen for word in _split(words.strip("[]'\""))):
        pattern = str(Path(word).expanduser())
        paths = [Path(pattern)]
        if glob.has_magic(pattern) and not paths[0].is_dir():
            paths = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if Run(path).is_run]  # noqa: PTH207
            if not paths:
                raise DiffxError(f"run={word} matches no run directory; give the folders that diffx train printed")
        for path in paths:
            found.setdefault(path.resolve(), Run(path))
    return list(found.values())


def _split(words: str) -> list[str]:
    """Takes a list apart at its commas, but not at those within the name of a folder."""
    parts, found = words.split(","), []
    while parts:
        # the longest piece that is a folder, or a pattern of some
        pieces = {n: str(Path(",".join(parts[:n]).strip()).expanduser()) for n in range(len(parts), 0, -1)}
        lengths = [n for n, piece in pieces.items() if Path(piece).is_dir() or glob.glob(piece, recursive=True)]  # noqa: PTH207
        length = lengths[0] if lengths else 1
        found.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return found
