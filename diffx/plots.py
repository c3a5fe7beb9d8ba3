"""Plots for the eye and for a paper: a metric over something, with its uncertainty; pictures in a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cycler import cycler
from matplotlib import rc_context
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from PIL import Image

from diffx.utils import atomic_path


@dataclass(frozen=True)
class Curve:
    """Points of one line.

    Arguments:
        x: where.
        y: the values.
        stderr: their standard errors, None where one is unknown; without any the line has no marks.
    """

    x: Sequence[float]
    y: Sequence[float]
    stderr: Sequence[float | None] | None = None


def plot_curves(
    curves: Mapping[str, Curve], path: Path, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False
) -> None:
    """Lines with error bars of one standard error.

    Arguments:
        curves: the lines by name; a single one needs no legend.
        path: the file, .png, .pdf or .svg.
        xlabel: the name of the horizontal axis.
        ylabel: the name of the vertical axis.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is, over at most eight decades.
    """
    many = len(curves) > 8
    figure = Figure(figsize=(8.0 if many else 6.0, 3.8), layout="constrained")
    axes = figure.subplots()
    # ten colours, then the same ten dashed
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=TABLEAU_COLORS.values()))
    for name, curve in curves.items():
        if curve.stderr is None:
            axes.plot(curve.x, curve.y, linewidth=1.4, label=name)
            continue
        errors = [error or 0.0 for error in curve.stderr]
        axes.errorbar(curve.x, curve.y, yerr=errors, marker="o", markersize=4, capsize=3, linewidth=1.4, label=name)
    if log_x:
        axes.set_xscale("log")
        ticks: list[float] = []
        for x in sorted({x for curve in curves.values() for x in curve.x}):
            if not ticks or x > 1.2 * ticks[-1]:  # labels would run into each other
                ticks.append(x)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, high / 1e8), high)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
        axes.legend(frameon=False, fontsize="small", **beside)
    _save(figure, path)


def plot_strip(pictures: Mapping[str, Path], path: Path) -> None:
    """Pictures side by side with their names above.

    Arguments:
        pictures: the files by name, in order.
        path: the file, .png, .pdf or .svg.
    """
    figure = Figure(figsize=(2.4 * len(pictures), 2.7), layout="constrained")
    for axes, (name, picture) in zip(
        figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True
    ):
        with Image.open(picture) as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
        axes.set_title(name, fontsize="medium")
        axes.axis("off")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # no date and no random names in the file: the same numbers give the same bytes
    with atomic_path(path) as temporary, rc_context({"svg.hashsalt": "diffx"}):
        metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
        figure.savefig(temporary, dpi=150, metadata=metadata)
