"""How the arms learned: loss and interim metrics over training, loss by noise level."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from diffx.plots import Chart, Line, decades
from diffx.report.arms import Arm
from diffx.report.plot import Control, Plot

POINTS = 150
"""Points of a curve at most: a plot has not more pixels than that to show them with."""

BAND = "Lines are means over seeds; bands reach from the lowest seed to the highest."

_LAST = 0.8
"""Losses by noise level are means over the training from here on, as a share of its steps."""

Log = Mapping[str, np.ndarray]
"""The columns of one run's log, float64, NaN where nothing was written."""


def logs_of(history: pd.DataFrame) -> dict[str, Log]:
    """The logs of all runs by their directories, in the order of their steps.

    Arguments:
        history: as `Collection.history`.
    """
    if history.empty:
        return {}
    runs, logs = np.asarray(history["run"], dtype=str), {}
    kept = ("step", "images", "flops", "device_seconds", "energy_kwh", "loss")
    names = [str(name) for name in history.columns if name in kept or str(name).startswith(("eval/", "loss/logsnr"))]
    columns = {name: np.asarray(pd.to_numeric(history[name], errors="coerce"), dtype=float) for name in names}
    for run in sorted(set(runs.tolist())):
        own = {name: column[runs == run] for name, column in columns.items()}
        order = np.argsort(own["step"], kind="stable")
        logs[run] = {name: column[order] for name, column in own.items()}
    return logs


def _columns(logs: Mapping[str, Log]) -> list[str]:
    """The columns in which something was written."""
    names = dict.fromkeys(name for log in logs.values() for name in log)
    return [name for name in names if any(np.isfinite(log[name]).any() for log in logs.values())]


def learning_curves(logs: Mapping[str, Log], arms: Sequence[Arm], metric: str) -> Plot | None:
    """Loss and interim metrics over steps, images, FLOPs and device-hours, whatever the logs have.

    Arguments:
        logs: as from `logs_of`.
        arms: the arms.
        metric: the metric that is shown next to the loss.
    """
    written = _columns(logs)
    columns = [name for name in written if name == "loss" or (name.startswith("eval/") and name != "eval/seconds")]
    columns.sort(key=lambda name: (name != "loss", name.rpartition("/")[2] != metric, name))
    if not columns:
        return None
    axes = _axes(logs, written)
    charts: dict[tuple[str, ...], Chart] = {}
    for column in columns:
        for option, key, unit, label in axes:
            lines = [line for arm in arms if (line := _curve(logs, arm, column, key, unit)) is not None]
            values = [y for line in lines for y in line.y]
            log = decades(values) > (0.7 if column == "loss" else 1.3)
            ylabel = "training loss" if column == "loss" else f"{_name(column)} during training"
            charts[_name(column), option] = Chart(lines, label, ylabel, log_y=log, bands=True)
    controls = (Control("show", tuple(map(_name, columns))), Control("over", tuple(axis[0] for axis in axes)))
    several = any(len(arm.members) > 1 for arm in arms)
    caption = BAND if several else "One seed per arm: there is no band."
    if len(columns) > 1:
        caption += " Metrics during training are of fewer images than the final ones, which shifts some of them."
    paper = [(shown, axes[0][0]) for shown in controls[0].options[:2]]
    return Plot("learning", "Learning curves", caption, charts, controls, paper)


def _name(column: str) -> str:
    *point, name = column.removeprefix("eval/").split("/")
    return name + (f" at {'/'.join(point)}" if point else "")


def _axes(logs: Mapping[str, Log], written: Sequence[str]) -> list[tuple[str, str, float, str]]:
    """What a curve can run over: option, column, unit and label."""
    found = [("steps", "step", 1.0, "training steps")]
    if "images" in written:
        found.append(("images", "images", 1.0, "training images"))
    if "flops" in written:
        sizes = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
        unit, word = _unit(_largest(logs, "flops"), sizes)
        found.append(("training FLOPs", "flops", unit, f"training compute [{word or 'FLOP'}]"))
    if "device_seconds" in written:
        unit, word = _unit(5 * _largest(logs, "device_seconds"), ((3600.0, "device-hours"), (60.0, "device-minutes")))
        found.append(("device-hours", "device_seconds", unit, f"training time [{word or 'device-seconds'}]"))
    if "energy_kwh" in written:
        found.append(("energy", "energy_kwh", 1.0, "energy of training [kWh]"))
    return found


def _largest(logs: Mapping[str, Log], column: str) -> float:
    return max(float(np.nanmax(log[column])) for log in logs.values() if np.isfinite(log[column]).any())


def _unit(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which there is at least one; 1 without a name where there is none."""
    return next(((size, name) for size, name in units if largest >= size), (1.0, ""))


def _curve(logs: Mapping[str, Log], arm: Arm, column: str, key: str, unit: float) -> Line | None:
    """The mean over an arm's runs at each step, from the lowest to the highest."""
    runs = [_of_run(logs[run], column, key) for run in sorted(arm.runs) if run in logs]
    steps = sorted({step for run in runs for step in run})
    if len(steps) > POINTS:
        steps = [steps[k] for k in np.linspace(0, len(steps) - 1, POINTS).round().astype(int)]
    if not steps:
        return None
    found = [[run[step] for run in runs if step in run] for step in steps]
    x = [float(np.mean([pair[0] for pair in pairs])) / unit for pairs in found]
    y = [[pair[1] for pair in pairs] for pairs in found]
    several = max(map(len, y)) > 1
    low, high = ([min(values) for values in y], [max(values) for values in y]) if several else (None, None)
    return Line(arm.label, x, [float(np.mean(values)) for values in y], low, high, arm.style)


def _of_run(log: Log, column: str, key: str) -> dict[float, tuple[float, float]]:
    """One run's (x, y) by step; a row of an evaluation has its images, FLOPs and seconds from the rows around it."""
    steps, x, y = log["step"], log[key], log[column]
    there, known = np.isfinite(x), np.isfinite(y)
    if not there.any():
        return {}
    across = np.interp(steps[known], steps[there], x[there])
    return dict(zip(steps[known].tolist(), zip(across.tolist(), y[known].tolist(), strict=True), strict=True))


def noise_levels(logs: Mapping[str, Log], arms: Sequence[Arm]) -> Plot | None:
    """The loss in each bin of logSNR, at the end of training.

    Arguments:
        logs: as from `logs_of`.
        arms: the arms.
    """
    columns = sorted((name for name in _columns(logs) if name.startswith("loss/logsnr")), key=_edge)
    lines = [line for arm in arms if (line := _levels(logs, arm, columns)) is not None]
    if not lines:
        return None
    chart = Chart(
        lines,
        "logSNR (from noise to clean image)",
        "training loss",
        log_y=decades([y for line in lines for y in line.y]) > 0.7,
        xticks=[_bin(name) for name in columns],
    )
    several = any(line.low is not None for line in lines)
    caption = f"Means over the last {1 - _LAST:.0%} of each training" + (
        "; bars reach from the lowest seed to the highest." if several else "."
    )
    return Plot("noise-levels", "Loss by noise level", caption, {(): chart})


def _levels(logs: Mapping[str, Log], arm: Arm, columns: Sequence[str]) -> Line | None:
    points: list[tuple[int, list[float]]] = []
    for k, name in enumerate(columns):
        means = [_end(logs[run], name) for run in sorted(arm.runs) if run in logs]
        finite = [mean for mean in means if np.isfinite(mean)]
        points += [(k, finite)] if finite else []
    if not points:
        return None
    y = [values for _, values in points]
    several = max(map(len, y)) > 1
    low, high = ([min(values) for values in y], [max(values) for values in y]) if several else (None, None)
    return Line(arm.label, [k for k, _ in points], [float(np.mean(v)) for v in y], low, high, arm.style)


def _end(log: Log, name: str) -> float:
    steps = log["step"]
    values = log[name][(steps >= _LAST * steps.max()) & np.isfinite(log[name])]
    return float(values.mean()) if len(values) else float("nan")


def _edge(name: str) -> float:
    """The lower end of a bin, by which bins are sorted."""
    text = name.removeprefix("loss/logsnr")
    if text.startswith("<"):
        return float("-inf")
    found = re.match(r">?(-?[\d.]+?)(?:\.\.|$)", text)
    return float(found.group(1)) if found else float("inf")


def _bin(name: str) -> str:
    text = name.removeprefix("loss/logsnr").replace("-", "−")
    if text[0] == "<":
        return f"below {text[1:]}"
    return f"above {text[1:]}" if text[0] == ">" else text.replace("..", " to ")
