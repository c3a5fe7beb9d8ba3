"""Times found by an optimiser, kept in a file."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule
from diffx.utils import DiffxError, write_text

FORMAT = "diffx discretization 1"


class Learned(Discretization):
    """Times found for one model, one sampler and one number of steps, read from a file.

    The file holds the logSNR of all times but the clean end, so that any schedule can use them, and what they were made
    for. Made by `diffx.learn_discretization`, after Tong et al., *Learning to Discretize Denoising Diffusion ODEs*
    (arXiv 2405.15506). Where the schedule's noisiest level lies after the file's first time, it is taken instead.

    Use it when a trained model is to be sampled very often, in few steps of a deterministic sampler.

    Arguments:
        path: the JSON file.

    Raises:
        DiffxError: if the file is missing or is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _read(self.path)
        self.logsnr: list[float] = content["logsnr"]
        self.made_for: dict[str, Any] = content["made_for"]

    @property
    def steps(self) -> int:
        """The number of steps K for which the times were made."""
        return len(self.logsnr)

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """The grid, as for every discretization.

        Raises:
            DiffxError: for another number of steps, a part of the range, or a schedule that has not all of the levels.
        """
        if steps != self.steps:
            raise DiffxError(
                f"the times in '{self.path}' were made for sampler.steps={self.steps}, not {steps}; set "
                f"sampler.steps={self.steps}, or learn times for {steps} steps"
            )
        if (start, stop) != (1.0, 0.0):
            raise DiffxError(
                f"the times in '{self.path}' go from noise to a clean sample, not from t = {start:g} to {stop:g}; "
                "choose another discretization for a part of the range"
            )
        with torch.no_grad():
            levels = torch.tensor(self.logsnr, dtype=torch.float64, device=schedule.device)
            times = torch.cat([schedule.inverse(levels).cpu(), torch.zeros(1, dtype=torch.float64)])
        if not (times.diff() < 0).all():
            raise DiffxError(
                f"the schedule has not all of the noise levels in '{self.path}', which was made on "
                f"{self.made_for.get('schedule', 'another one')}; learn times on the schedule you sample on"
            )
        return times


def save(path: str | Path, logsnr: Tensor, made_for: dict[str, Any]) -> None:
    """Writes the file that `Learned` reads.

    Arguments:
        path: the file.
        logsnr: noise levels of all times but the clean end, increasing, `[K]`.
        made_for: what the times were made for, plain values: sampler, steps, schedule, errors before and after.

    Raises:
        DiffxError: if the file cannot be written.
    """
    content = {"format": FORMAT, "steps": len(logsnr), "logsnr": logsnr.tolist(), "made_for": made_for}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffxError(
            f"cannot read the times '{path}': {error.strerror or error}; give discretization.path=FILE"
        ) from error
    except ValueError as error:
        raise DiffxError(f"'{path}' is no file of learned times, but no JSON at all; learn the times again") from error
    if not _is_valid(content):
        raise DiffxError(
            f"'{path}' is no file of learned times: it lacks increasing noise levels or the format '{FORMAT}'; learn "
            "the times again"
        )
    return content


def _is_valid(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    levels = content.get("logsnr")
    return (
        isinstance(levels, list)
        and len(levels) > 0
        and all(isinstance(level, int | float) and math.isfinite(level) for level in levels)
        and all(a < b for a, b in itertools.pairwise(levels))
        and isinstance(content.get("made_for"), dict)
    )
