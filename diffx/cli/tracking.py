"""The loggers of a run, and what they are told of it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffx.cli.build import Arm, make
from diffx.evaluation import Evaluation
from diffx.experiment import Run, fingerprint, identity
from diffx.training.checkpoint_files import shards_of
from diffx.training.loggers import About, CSVLogger, Tracked, trackers


def loggers_of(arm: Arm, run: Run, step: int) -> list[CSVLogger | Tracked]:
    """The CSV, and the trackers that `logger=` names.

    Arguments:
        arm: what is trained, built.
        run: its directory.
        step: the training step that it goes on from.

    Raises:
        DiffxError: if a tracker's library is missing.
    """
    parameters = sum(parameter.numel() for parameter in arm.module.denoiser.parameters())
    about = about_of(arm.config, run, step, {"parameters": parameters})
    chosen = arm.config["logger"]
    return [CSVLogger(run.path / "metrics.csv"), *(Tracked(key, make(chosen, key)(about=about)) for key in chosen)]


def about_of(config: dict[str, Any], run: Run, step: int, facts: dict[str, float]) -> About:
    """What trackers are told of a run."""
    digest, seed = fingerprint(identity(config)), config["seed"]
    arm = run.path.parent.name
    return About(
        directory=run.path,
        run_id=f"{digest}-seed{seed}",
        group=digest,
        name=f"{arm}/{run.path.name}",
        tags=[config["name"], *_overrides(arm)],
        config=config,
        launch=_launch(run.path / "launches.jsonl"),
        facts={"seed": seed, **facts},
        step=step,
    )


def log_evaluation(loggers: Iterable[CSVLogger | Tracked], name: str, evaluation: Evaluation, step: int) -> None:
    """Values to all loggers, the table with errors and protocol to the trackers."""
    loggers = list(loggers)
    row = {f"{name}/{metric}": value.value for metric, value in evaluation.values.items()}
    for logger in loggers:
        logger.log_metrics(row, step=step)
    for tracked in trackers(loggers):
        tracked.log_evaluation(name, evaluation, step)


def log_weights(loggers: Iterable[CSVLogger | Tracked], run: Run, step: int) -> None:
    """The inference weights, the newest checkpoint and the config, to the trackers that keep them."""
    checkpoint, _ = run.newest_checkpoint()
    saved = [checkpoint, *shards_of(checkpoint)] if checkpoint else []
    files = [*sorted(run.weights.parent.glob("*.safetensors")), run.config_file, *saved]
    for tracked in trackers(loggers):
        tracked.log_files(files, step)


def _overrides(arm: str) -> list[str]:
    """`schedule=cosine,seed=1-<hash>`, the name of an arm's directory, as its overrides."""
    return [word for word in re.split(r",(?=[\w.@/]+=)", arm.rpartition("-")[0]) if "=" in word]


def _launch(file: Path) -> dict[str, Any]:
    """The newest launch of a run."""
    try:
        return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):  # a rank may come before the record
        return {}
