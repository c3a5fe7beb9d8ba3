"""Whether two runs of one experiment came to the same, bit for bit."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffx.experiment.run import Run

TIMES = {"images_per_second", "eval/seconds", "data_wait", "device_seconds", "energy_kwh"}
"""Columns of `metrics.csv` that are times."""


def differences(run: Run, reference: Run) -> list[str]:
    """What differs between two finished runs: final weights, EMA, optimizer, history of metrics, evaluations.

    Times and paths are no differences.

    Arguments:
        run: a run.
        reference: another one of the same experiment and seed.

    Returns:
        Names such as `optimizer_states/0/state/3/exp_avg` or `metrics.csv, row 7, loss`; empty if there are none.
    """
    from diffx.training.checkpoint_files import read_checkpoint  # slow to import

    found = []
    ours, theirs = run.newest_checkpoint()[0], reference.newest_checkpoint()[0]
    if ours is None or theirs is None:
        return [f"'{(run if ours is None else reference).path}' has no checkpoint"]
    actual, expected = (read_checkpoint(file) for file in (ours, theirs))
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "training_log"):
        found += _unequal(actual[key], expected[key], key)
    exported = sorted(file.name for file in reference.weights.parent.glob("*.safetensors"))
    for name in exported:
        found += _unequal(_tensors(run.weights.with_name(name)), _tensors(reference.weights.with_name(name)), name)
    found += _unequal(_rows(run), _rows(reference), "metrics.csv")
    return found + _unequal(_evaluations(run), _evaluations(reference), "evaluations")


def _unequal(actual: Any, expected: Any, where: str) -> list[str]:
    if type(actual) is not type(expected):
        return [where]
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            return [f"{where}: {', '.join(sorted(map(str, actual.keys() ^ expected.keys())))}"]
        return [name for key in expected for name in _unequal(actual[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, list | tuple):
        if len(actual) != len(expected):
            return [f"{where}: {len(actual)} instead of {len(expected)}"]
        pairs = enumerate(zip(actual, expected, strict=True))
        return [name for k, (a, b) in pairs for name in _unequal(a, b, f"{where}/{k}")]
    if isinstance(expected, torch.Tensor):
        same = actual.dtype == expected.dtype and actual.shape == expected.shape
        # bits: of two NaN too
        return [] if same and actual.equal(expected) else [where]
    same = actual == expected or (isinstance(expected, float) and math.isnan(expected) and math.isnan(actual))
    return [] if same else [where]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def _rows(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def _evaluations(run: Run) -> dict[str, Any]:
    """What each evaluation has measured."""
    return {
        file.name: json.loads(file.read_text(encoding="utf-8"))["values"]
        for file in sorted(run.evaluations.glob("*.json"))
    }
