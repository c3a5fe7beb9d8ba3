"""A comparison as a table: for the terminal, in Markdown, in LaTeX and as CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diffx.compare.arms import text
from diffx.compare.comparison import Comparison, Row
from diffx.compare.effects import Estimate
from diffx.compare.known import arrow
from diffx.compare.legend import legend
from diffx.utils import DiffxError

ONE_SEED, OTHERWISE = "*", "†"
NOTHING = "–"
VERDICT = "verdict"


@dataclass(frozen=True)
class _Sheet:
    """Headings, rows of cells, and how many of the first columns are words; so is the verdict."""

    headings: list[str]
    rows: list[list[str]]
    words: int

    @property
    def left(self) -> list[bool]:
        return [k < self.words or heading == VERDICT for k, heading in enumerate(self.headings)]


def render(comparison: Comparison, form: str, pivot: bool = False, best_seed: bool = False) -> str:
    """The comparison as text in one of `FORMATS`.

    Raises:
        DiffxError: if a pivot is asked of other than two columns.
    """
    return FORMATS[form](comparison, pivot, best_seed)


def to_rich(comparison: Comparison, pivot: bool = False, best_seed: bool = False) -> Group:
    """The table for the terminal, with its legend and notes as a list.

    Arguments:
        comparison: what to show.
        pivot: whether to make the second of two columns the headings.
        best_seed: whether to show the best seed too, labelled so.
    """
    sheet = _sheet(comparison, pivot, best_seed)
    table = Table()
    for heading, left in zip(sheet.headings, sheet.left, strict=True):
        table.add_column(escape(heading), justify="left" if left else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    told = [f"• {sentence}" for sentence in [*legend(comparison, best_seed), *comparison.notes]]
    return Group(table, *map(Text, told))


def to_markdown(comparison: Comparison, pivot: bool = False, best_seed: bool = False) -> str:
    """The table in Markdown, with its legend and notes as a list."""
    sheet = _sheet(comparison, pivot, best_seed)
    rule = ["---" if left else "---:" for left in sheet.left]
    escaped = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in sheet.rows]
    lines = ["| " + " | ".join(row) + " |" for row in [sheet.headings, rule, *escaped]]
    told = [sentence.replace("*", "\\*") for sentence in [*legend(comparison, best_seed), *comparison.notes]]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in told)]) + "\n"


def to_latex(comparison: Comparison, pivot: bool = False, best_seed: bool = False) -> str:
    """The table in LaTeX, for the package booktabs: the legend is its caption, the notes are comments above it."""
    sheet = _sheet(comparison, pivot, best_seed)
    columns = "".join("l" if left else "r" for left in sheet.left)
    caption = " ".join(_tex(sentence[:1].upper() + sentence[1:]) + "." for sentence in legend(comparison, best_seed))
    label = "".join(letter if letter.isalnum() else "-" for letter in comparison.metric)
    body = [" & ".join(map(_tex, row)) + r" \\" for row in sheet.rows]
    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {' '.join(note.split())}" for note in comparison.notes),
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_tex, sheet.headings)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(comparison: Comparison, pivot: bool = False, best_seed: bool = False) -> str:
    """All numbers unrounded, a row each; a pivot has the cells of the other formats."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if pivot:
        sheet = _sheet(comparison, pivot, best_seed)
        writer.writerows([sheet.headings, *sheet.rows])
        return buffer.getvalue()
    best = ["best_of_seeds", "best_seed"] if best_seed else []
    writer.writerow(["metric", *comparison.columns, *_NUMBERS, *best])
    for row in comparison.rows:
        found = comparison.best_seed(row) or ("", "")
        cells = [comparison.metric, *(text(row.cells[key]) for key in comparison.columns)]
        writer.writerow([*cells, *_numbers(row), *((found[1], found[0]) if best_seed else ())])
    return buffer.getvalue()


def _to_terminal(comparison: Comparison, pivot: bool, best_seed: bool) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(to_rich(comparison, pivot, best_seed))
    return console.file.getvalue()  # type: ignore[attr-defined]


FORMATS: dict[str, Callable[[Comparison, bool, bool], str]] = {
    "terminal": _to_terminal,
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}
"""What a comparison can be written as."""

_NUMBERS = (
    *("seeds", "mean", "low", "high", "interval_over", "values"),
    *("difference", "difference_low", "difference_high", "difference_over", "difference_seeds"),
    *("p_holm", "verdict", "measured_otherwise", "nfe", "images_per_second", "device_hours", "floor"),
)


def _numbers(row: Row) -> list[object]:
    def estimate(found: Estimate | None) -> list[object]:
        return ["", "", "", ""] if found is None else [found.value, *(found.interval or ("", "")), found.over]

    values = ";".join(f"{seed}:{value.value!r}" for seed, value in row.values.items())
    known = [row.p, row.verdict, "; ".join(row.mismatch), row.nfe, row.images_per_second, row.device_hours, row.floor]
    seeds = ";".join(map(str, row.effect_seeds))
    found = [len(row.values), *estimate(row.mean), values, *estimate(row.effect), seeds, *known]
    return ["" if value is None else value for value in found]


def _sheet(comparison: Comparison, pivot: bool, best_seed: bool) -> _Sheet:
    return _pivoted(comparison, best_seed) if pivot else _plain(comparison, best_seed)


def _plain(comparison: Comparison, best_seed: bool) -> _Sheet:
    keys = comparison.columns
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("seeds", _seeds),
        (_headed(comparison), _mean),
        *([("best of seeds", partial(_best, comparison))] if best_seed else []),
        ("difference [95 %]", _effect),
        (VERDICT, _verdict),
    ]
    costs: list[tuple[str, Callable[[Row], float | None]]] = [
        ("NFE", lambda row: row.nfe),
        ("images/s", lambda row: row.images_per_second),
        (f"{comparison.device}-hours", lambda row: row.device_hours),
    ]
    known = [(name, cost) for name, cost in costs if any(cost(row) is not None for row in comparison.rows)]
    rows = [
        [
            *([text(row.cells[key]) for key in keys] if keys else [row.name]),
            *(cell(row) for _, cell in columns),
            *(_number(cost(row), 3) for _, cost in known),
        ]
        for row in comparison.rows
    ]
    names = [name for name, _ in (*columns, *known)]
    return _Sheet([*(keys or ["arm"]), *names], rows, max(len(keys), 1))


def _headed(comparison: Comparison) -> str:
    return f"{comparison.metric} {arrow(comparison.metric)}".strip()


def _pivoted(comparison: Comparison, best_seed: bool) -> _Sheet:
    if len(comparison.columns) != 2:
        told = ", ".join(comparison.columns) or "nothing"
        raise DiffxError(
            f"--pivot takes two axes, but the rows differ in {told}; name two with --by, and choose one value of each "
            "other one, as sampler.steps=20"
        )
    down, across = comparison.columns
    values = [list(dict.fromkeys(text(row.cells[key]) for row in comparison.rows)) for key in (down, across)]
    found = {(text(row.cells[down]), text(row.cells[across])): row for row in comparison.rows}
    headings = [f"{_headed(comparison)}: {down}", *(f"{across}={value}" for value in values[1])]
    rows = [[a, *(_crossing(comparison, found.get((a, b)), best_seed) for b in values[1])] for a in values[0]]
    return _Sheet(headings, rows, 1)


def _crossing(comparison: Comparison, row: Row | None, best_seed: bool) -> str:
    if row is None:
        return NOTHING
    parts = [_mean(row), row.verdict]
    parts += [f"best of seeds {_best(comparison, row)}"] if best_seed else []
    return ", ".join(part for part in parts if part)


def _seeds(row: Row) -> str:
    return str(len(row.values)) + (f" of {len(row.runs)}" if len(row.values) < len(row.runs) else "")


def _mean(row: Row) -> str:
    if row.mean is None:
        return NOTHING
    one = ONE_SEED if len(row.values) == 1 else ""
    other = OTHERWISE if row.mismatch else ""
    value, half = rounded(row.mean.value, row.mean.half)
    return value + (f" ± {half}" if half else "") + " " * bool(one or other) + one + other


def _best(comparison: Comparison, row: Row) -> str:
    found = comparison.best_seed(row)
    return NOTHING if found is None else f"{_number(found[1])} (seed {found[0]}, of {len(row.values)})"


def _effect(row: Row) -> str:
    if row.effect is None:
        return "" if row.is_baseline else NOTHING
    if row.effect.interval is None:
        return _number(row.effect.value)
    value, low, high = _alike([row.effect.value, *row.effect.interval], row.effect.half)
    return f"{value} [{low}, {high}]" + (f" {ONE_SEED}" if row.effect.over == "samples" else "")


def _verdict(row: Row) -> str:
    if row.p is None:
        return f"measured otherwise {OTHERWISE}" if row.mismatch else row.verdict
    told = f"p {row.p:.2g}" if row.p >= 1e-4 else "p < 0.0001"
    return f"{row.verdict}, {told}" if row.verdict else ""


def rounded(value: float, half: float | None) -> tuple[str, str]:
    """A value and half its interval, rounded to two digits of the latter; of none to four digits of the value."""
    if half is None or not math.isfinite(half) or half <= 0:
        return f"{value:.4g}", "" if half is None else f"{half:.2g}"
    first, second = _alike([value, half], half)
    return first, second


def _alike(values: Sequence[float], half: float | None) -> list[str]:
    """Values with as many decimals as show two digits of half an interval."""
    if not half or not math.isfinite(half) or not 1e-6 < half < 1e6:
        return [f"{value:.4g}".replace("-", "−") for value in values]
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return [f"{value:.{decimals}f}".replace("-", "−") for value in values]


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _tex(words: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in words)


_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "−": "$-$",
    "-": "-",
    "–": "--",
    "…": r"\dots{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "†": r"$^\dagger$",
    "*": "$^*$",
    "×": r"$\times$",
    "≤": r"$\le$",
    "√": r"$\surd$",
}
