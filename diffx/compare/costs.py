"""What runs took, from their training logs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from diffx.compare.budget import Budget
from diffx.experiment import Collection, Member

_COLUMNS = ("images_per_second", "flops", "device_seconds")


@dataclass(frozen=True)
class Costs:
    """What runs took, by their directories; what a run does not tell is missing.

    Arguments:
        speed: images per second of training, the median over the log.
        spent: by the names of `diffx.compare.budget.TOLERANCE`, what each run was trained with.
        arms: the runs of each arm.
    """

    speed: Mapping[Path, float]
    spent: Mapping[str, Mapping[Path, float]]
    arms: Sequence[Sequence[Path]]

    @property
    def hours(self) -> dict[Path, float]:
        """Device-hours of training."""
        return {path: seconds / 3600 for path, seconds in self.spent["device-seconds"].items()}

    def budget(self, device: str) -> Budget:
        """What of it was equal over the arms."""
        known = {}
        for name, amounts in self.spent.items():
            if self.arms and all(path in amounts for paths in self.arms for path in paths):
                known[name] = [math.fsum(amounts[path] for path in paths) / len(paths) for paths in self.arms]
        return Budget(known, device)


def costs_of(collection: Collection) -> Costs:
    """What the runs of a collection took."""
    arms: dict[str, list[Path]] = {}
    logged: dict[str, dict[Path, float]] = {column: {} for column in _COLUMNS}
    for member in collection.members:
        arms.setdefault(member.arm, []).append(member.run.path)
        try:  # of thousands of logs these columns only
            log = pd.read_csv(
                member.run.path / "metrics.csv", usecols=lambda name: name in _COLUMNS, on_bad_lines="skip"
            )
            columns = {name: log[name].to_numpy(float) for name in _COLUMNS if name in log}
        except (OSError, ValueError, TypeError):  # not begun, empty or damaged
            continue
        for name, column in columns.items():
            known = column[np.isfinite(column)]
            if len(known):
                number = np.median(known) if name == "images_per_second" else known.max()
                logged[name][member.run.path] = float(number)
    steps = {m.run.path: float(step) for m in collection.members if (step := _steps(m))}
    spent = {
        "steps": steps,
        "images": {m.run.path: images for m in collection.members if (images := _images(m, steps))},
        "FLOPs": logged["flops"],
        "device-seconds": logged["device_seconds"],
    }
    return Costs(logged["images_per_second"], spent, list(arms.values()))


def device_of(collection: Collection) -> str:
    """`GPU` where all runs were evaluated on one, else `device`."""
    devices = [str(m.evaluation.environment.get("device", "")) for _, m in collection.measurements]
    return "GPU" if devices and all(device.startswith("cuda") for device in devices) else "device"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _steps(member: Member) -> float | None:
    return member.status.get("step") or member.config.get("training", {}).get("max_steps")


def _images(member: Member, steps: Mapping[Path, float]) -> float | None:
    size = member.config.get("data", {}).get("batch_size")
    return steps[member.run.path] * size if size and member.run.path in steps else None
