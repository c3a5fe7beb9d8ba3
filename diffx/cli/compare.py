"""`diffx compare`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from diffx.compare import FORMATS, compare, render, to_rich
from diffx.experiment import read_runs
from diffx.utils import DiffxError, nearest, write_text

VALUES = ("metric", "by", "baseline", "format", "out")
FLAGS = ("pivot", "best-seed", "allow-mismatch")
_SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".txt": "terminal"}


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Arguments:
        roots: folders of runs.
        values: by the names of `VALUES`.
        flags: those of `FLAGS` that are set.
        wanted: values to select by, by key.
    """

    roots: list[str]
    values: dict[str, str]
    flags: set[str]
    wanted: dict[str, list[str]]


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    asked = parse(argv)
    form, out = _format(asked.values)
    collection = read_runs(*(asked.roots or ["runs"]))
    if asked.wanted:
        collection = collection.where(asked.wanted)
    by = asked.values.get("by")
    metrics: list[str | None] = [*_parts(asked.values.get("metric", ""))] or [None]
    found = [
        compare(
            collection,
            metric,
            None if by is None else _parts(by),
            asked.values.get("baseline"),
            "allow-mismatch" in asked.flags,
        )
        for metric in metrics
    ]
    how = ("pivot" in asked.flags, "best-seed" in asked.flags)
    if out is None and form == "terminal":
        # a table in a log file needs no terminal's width
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        for comparison in found:
            console.print(to_rich(comparison, *how))
        return 0
    texts = [render(comparison, form, *how) for comparison in found]
    if form == "csv":  # one heading for all
        texts[1:] = [text.partition("\n")[2] for text in texts[1:]]
    text = ("" if form == "csv" else "\n").join(texts)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(f"table       {out}")
    if form == "csv" or form == "latex":
        for note in dict.fromkeys(note for comparison in found for note in comparison.notes):
            print(f"diffx: {note}", file=sys.stderr)
    return 0


def parse(argv: list[str]) -> Asked:
    """Options as `--metric NAME`, `--metric=NAME` or `metric=NAME`; other KEY=VALUE select runs; the rest are folders.

    Raises:
        DiffxError: for an unknown option, or one without its value.
    """
    roots: list[str] = []
    values: dict[str, str] = {}
    flags: set[str] = set()
    wanted: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        option = word.startswith("--")
        key, sign, value = word.removeprefix("--").partition("=")
        key = key.replace("_", "-") if option or key.replace("_", "-") in FLAGS else key
        if key in FLAGS and (option or sign):
            if value.lower() not in ("", "true", "false"):
                raise DiffxError(f"--{key} is on or off and takes no '{value}'; leave it out")
            (flags.discard if value.lower() == "false" else flags.add)(key)
        elif key in VALUES and (option or sign):
            if not sign and (not words or words[0].startswith("--")):
                raise DiffxError(f"--{key} lacks its value; diffx compare --help has examples")
            values[key] = value if sign else words.pop(0)
        elif word.startswith("-"):
            names = [f"--{name}" for name in (*VALUES, *FLAGS)]
            raise DiffxError(f"there is no option '{word}'{nearest(word, names)}; diffx compare has {', '.join(names)}")
        elif sign and not Path(word).exists():  # a run's folder has = in its name
            wanted[key] = _parts(value)
        else:
            roots.append(word)
    return Asked(roots, values, flags, wanted)


def _format(values: dict[str, str]) -> tuple[str, Path | None]:
    out = Path(values["out"]).expanduser() if "out" in values else None
    form = values.get("format") or ("terminal" if out is None else _SUFFIXES.get(out.suffix, ""))
    if form not in FORMATS:
        if not form:
            raise DiffxError(f"'{out}' does not say its format; let it end in {', '.join(_SUFFIXES)}, or add --format")
        raise DiffxError(f"there is no format '{form}'{nearest(form, FORMATS)}; choose one of {', '.join(FORMATS)}")
    return form, out


def _parts(words: str) -> list[str]:
    return [word.strip() for word in words.strip("[]").split(",") if word.strip()]
