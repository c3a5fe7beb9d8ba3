"""Plots for the eye and for a paper: a metric over something, with its uncertainty; pictures in a row."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
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


@dataclass(frozen=True)
class Line:
    """Points of one arm in a `Chart`.

    Arguments:
        name: what the legend calls it.
        x: where; positions of the ticks where the axis has names instead of numbers.
        y: the values.
        low: lower ends of the intervals, None where there is none.
        high: upper ends.
        style: the number of its colour, dash and marker, the same for an arm in every chart; None is grey and dotted.
        joined: whether the points are joined.
        notes: what is said of each point beside its numbers.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    style: int | None = 0
    joined: bool = True
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Lines with their axes, to be drawn on paper or on a page.

    Arguments:
        lines: what is drawn.
        xlabel: the name of the horizontal axis, with its unit.
        ylabel: the name of the vertical axis, with its unit.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is.
        xticks: names at positions 0, 1, … of the horizontal axis.
        yticks: names at positions 0, 1, … of the vertical axis, from above; intervals then are horizontal.
        bands: whether intervals are shaded bands instead of bars.
        mark: a reference value of the axis that has numbers, drawn as a thin line.
    """

    lines: Sequence[Line]
    xlabel: str
    ylabel: str
    log_x: bool = False
    log_y: bool = False
    xticks: Sequence[str] = field(default=())
    yticks: Sequence[str] = field(default=())
    bands: bool = False
    mark: float | None = None


GREY = "#7f7f7f"
COLORS: tuple[str, ...] = tuple(str(color) for color in TABLEAU_COLORS.values() if color != GREY)


def plot_chart(chart: Chart, path: Path, letters: bool = False) -> None:
    """Draws a chart.

    Arguments:
        chart: what is drawn.
        path: the file, .png, .pdf or .svg.
        letters: whether letters of an .svg stay letters, in the reader's fonts, which makes it several times smaller.
    """
    many = len(chart.lines) > 6
    height = max(2.4, 0.34 * len(chart.yticks) + 1.2) if chart.yticks else 3.8
    figure = Figure(figsize=(8.4 if many and not chart.yticks else 6.4, height), layout="constrained")
    axes = figure.subplots()
    for line in chart.lines:
        _draw(axes, line, chart)
    if chart.mark is not None:
        (axes.axvline if chart.yticks else axes.axhline)(chart.mark, color="0.5", linewidth=0.8, linestyle=":")
    for log, axis, scale in ((chart.log_x, axes.xaxis, axes.set_xscale), (chart.log_y, axes.yaxis, axes.set_yscale)):
        if log:
            scale("log")
            ticks = log_ticks([v for line in chart.lines for v in (line.x if axis is axes.xaxis else line.y)])
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_minor_locator(NullLocator())
    if chart.xticks:
        turned = {"rotation": 25, "ha": "right"} if max(map(len, chart.xticks)) > 60 // len(chart.xticks) else {}
        axes.set_xticks(range(len(chart.xticks)), list(chart.xticks), **turned)
        axes.margins(x=0.12)
    if chart.yticks:
        axes.set_yticks(range(len(chart.yticks)), list(chart.yticks))
        axes.set_ylim(len(chart.yticks) - 0.5, -0.5)
    axes.set_xlabel(chart.xlabel)
    axes.set_ylabel(chart.ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    named = {line.name for line in chart.lines if line.name}
    if len(named) > 1 and not chart.yticks:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
        axes.legend(frameon=False, fontsize="small", **beside)
    with rc_context({"svg.fonttype": "none" if letters else "path"}):
        _save(figure, path)


def log_ticks(values: Sequence[float]) -> list[float]:
    """Where a logarithmic axis has ticks: at few different values there, else at 1, 2 and 5 times powers of ten.

    Arguments:
        values: what is drawn, positive.
    """
    distinct = sorted(set(values))
    if len(distinct) <= 6 and all(b > 1.25 * a for a, b in itertools.pairwise(distinct)):
        return distinct
    low, high = distinct[0] / 1.1, distinct[-1] * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]


def decades(values: Sequence[float]) -> float:
    """How many powers of ten positive values span; 0 where one is not positive."""
    if not values or min(values) <= 0:
        return 0.0
    return math.log10(max(values) / min(values))


def look(style: int | None) -> tuple[str, str, str]:
    """Colour, dash and marker of a style, as matplotlib writes them: nine colours, then the same ones dashed."""
    if style is None:
        return GREY, ":", "|"
    return COLORS[style % len(COLORS)], ("-", "--", "-.")[style // len(COLORS) % 3], "osD^vPX"[style % 7]


def marked(line: Line) -> bool:
    """Whether its points have markers: not where they would run into each other."""
    return not line.joined or (line.style is not None and len(line.x) <= 12)


def _draw(axes: Axes, line: Line, chart: Chart) -> None:
    color, dash, marker = look(line.style)
    drawn = {"color": color, "label": line.name or None, "linestyle": dash if line.joined else "none"}
    drawn |= {"marker": marker, "markersize": 5} if marked(line) else {}
    axes.plot(line.x, line.y, linewidth=1.4, **drawn)
    if line.low is None or line.high is None:
        return
    bounds = zip(line.x, line.y, line.low, line.high, strict=True)
    known = [(x, y, low, high) for x, y, low, high in bounds if low is not None and high is not None]
    x, y, low, high = ([point[k] for point in known] for k in range(4))
    if chart.bands:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    elif chart.yticks:
        axes.hlines(y, low, high, color=color, linewidth=1.4)
    else:
        axes.vlines(x, low, high, color=color, linewidth=1.4)


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
        shown = [y for curve in curves.values() for y in curve.y]
        if 0 < decades(shown) < 3:  # powers of ten alone would be too few
            ticks = log_ticks(shown)
            axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
            axes.minorticks_off()
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
