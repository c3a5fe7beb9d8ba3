"""A plot of the page: one chart, or several between which the reader chooses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffx.plots import Chart, Line, log_ticks, look, marked
from diffx.report.numbers import number, rounded


@dataclass(frozen=True)
class Control:
    """One question to the reader.

    Arguments:
        label: what is chosen.
        options: the words for the choices, the first one is shown at first.
    """

    label: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """Charts of one kind.

    Arguments:
        key: a word for ids and file names.
        title: what it shows.
        caption: how to read it.
        charts: by the chosen option of each control.
        controls: what can be chosen.
        paper: the charts that are files of their own; all by default.
    """

    key: str
    title: str
    caption: str
    charts: dict[tuple[str, ...], Chart]
    controls: tuple[Control, ...] = field(default=())
    paper: Sequence[tuple[str, ...]] = field(default=())

    @property
    def first(self) -> Chart:
        """What is shown at first, and printed."""
        return self.charts[tuple(control.options[0] for control in self.controls)]

    @property
    def alt(self) -> str:
        """What it shows, for who does not see it."""
        names = list(dict.fromkeys(line.name for line in self.first.lines if line.name))
        shown = "" if len(names) > 12 or self.first.yticks else f" Lines: {'; '.join(names)}."
        return f"{self.title}: {self.first.ylabel or 'arms'} against {self.first.xlabel}.{shown} {self.caption}"

    @property
    def content(self) -> dict[str, Any]:
        """All charts for the page's script."""
        return {
            "key": self.key,
            "figures": {"|".join(chosen): figure(chart) for chosen, chart in self.charts.items()},
        }

    @property
    def named(self) -> bool:
        """Whether there is more than one line to tell apart."""
        return len({line.name for line in self.first.lines if line.style is not None}) > 1

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """The points of the first chart as name, x, y and interval; none if there are too many to read."""
        if sum(len(line.x) for line in self.first.lines) > 160 or self.first.yticks:
            return []
        return [row for line in self.first.lines if line.style is not None for row in _rows(line, self.first)]


def _rows(line: Line, chart: Chart) -> Iterator[tuple[str, str, str, str]]:
    for k, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        low = None if line.low is None else line.low[k]
        high = None if line.high is None else line.high[k]
        half, between = None, ""
        if low is not None and high is not None:
            half = (high - low) / 2
            between = f"{number(low, half)} to {number(high, half)}"
        yield line.name, chart.xticks[round(x)] if chart.xticks else number(x), number(y, half), between


def figure(chart: Chart) -> dict[str, Any]:
    """A chart as plotly draws it; colours of text and grid are the page's.

    Returns:
        `data` and `layout`, JSON-like.
    """
    data: list[dict[str, Any]] = []
    named: set[str] = set()
    for line in chart.lines:
        data += _traces(line, chart, line.name not in named)
        named.add(line.name)
    sideways = bool(chart.yticks)
    layout: dict[str, Any] = {
        "xaxis": _axis(chart.xlabel, chart.log_x, chart.xticks, [x for line in chart.lines for x in line.x]),
        "yaxis": _axis(chart.ylabel, chart.log_y, chart.yticks, [y for line in chart.lines for y in line.y]),
        "showlegend": len(named - {""}) > 1 and not sideways,
        "height": max(200, 34 * len(chart.yticks) + 90) if sideways else 390,
    }
    if sideways:
        layout["yaxis"] |= {"range": [len(chart.yticks) - 0.5, -0.5]}
    if chart.mark is not None:
        along, across = ("x", "y") if sideways else ("y", "x")
        ends = {f"{along}0": chart.mark, f"{along}1": chart.mark, f"{across}0": 0, f"{across}1": 1}
        shape = {"type": "line", f"{across}ref": "paper", "line": {"width": 1, "dash": "dot", "color": "#888"}}
        layout["shapes"] = [shape | ends]
    return {"data": data, "layout": layout}


_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
_MARKERS = {
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x",
    "|": "line-ns-open",
}  # fmt: skip


def _traces(line: Line, chart: Chart, legend: bool) -> list[dict[str, Any]]:
    color, dash, marker = look(line.style)
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": line.name,
        "legendgroup": line.name,
        "showlegend": legend and bool(line.name),
        "x": [rounded(x) for x in line.x],
        "y": [rounded(y) for y in line.y],
        "mode": "+".join(["lines"] * line.joined + ["markers"] * marked(line)),
        "line": {"color": color, "width": 2, "dash": _DASHES[dash]},
        "hovertemplate": _hover(line, chart),
    }
    if marked(line):
        trace["marker"] = {"color": color, "symbol": _MARKERS[marker], "size": 8}
    if line.notes:
        trace["text"] = list(line.notes)
    if line.low is None or line.high is None:
        return [trace]
    if not chart.bands:
        values = line.x if chart.yticks else line.y
        above = [_gap(high, value) for high, value in zip(line.high, values, strict=True)]
        below = [_gap(value, low) for low, value in zip(line.low, values, strict=True)]
        bars = {"array": above, "arrayminus": below, "symmetric": False, "color": color, "thickness": 1.5, "width": 4}
        return [trace | {"error_x" if chart.yticks else "error_y": bars}]
    known = [k for k in range(len(line.x)) if line.low[k] is not None and line.high[k] is not None]
    if not known:
        return [trace]
    there, back = [rounded(line.x[k]) for k in known], [rounded(line.high[k]) for k in reversed(known)]
    band = {
        "type": "scatter",
        "x": there + there[::-1],
        "y": [rounded(line.low[k]) for k in known] + back,
        "fill": "toself",
        "fillcolor": f"rgba({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))}, 0.18)",
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "legendgroup": line.name,
        "showlegend": False,
    }
    return [band, trace]


def _gap(high: float | None, low: float | None) -> float | None:
    return None if high is None or low is None else rounded(max(0.0, high - low))


def _hover(line: Line, chart: Chart) -> str:
    across, up = ("%{x}" if not chart.xticks else ""), ("%{y}" if not chart.yticks else "")
    said = [f"<b>{line.name}</b>" if line.name else ""]
    said += [f"{chart.xlabel}: {across}" if across else "%{x}", f"{chart.ylabel}: {up}" if up else ""]
    said += ["%{text}"] if line.notes else []
    return "<br>".join(part for part in said if part) + "<extra></extra>"


def _axis(label: str, log: bool, names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label}, "automargin": True, "zeroline": False}
    if log:
        ticks = log_ticks(values)
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    if names:
        axis |= {"tickvals": list(range(len(names))), "ticktext": [_wrapped(name) for name in names]}
        axis |= {"range": [-0.5, len(names) - 0.5]}
    return axis


def _wrapped(name: str, width: int = 22) -> str:
    """A long label broken at its commas."""
    lines = [""]
    for word in name.split(", "):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines[-1] += ","
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return "<br>".join(lines)
