"""`diffx report`: one page that answers the question of a sweep."""

import argparse
import shlex
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from diffx.compare import compare
from diffx.compare.arms import final
from diffx.experiment import Collection, read_runs
from diffx.report import Verdicts, verdicts_of, without_verdicts, write_report
from diffx.utils import DiffxError, nearest

OPTIONS = {
    "--metric": None,
    "--by": None,
    "--baseline": None,
    "--out": "report.html",
    "--title": "",
    "--question": "",
    "--figures": None,
}
"""What can be set, with the default."""

FLAG = "--allow-mismatch"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DiffxError(f"{message}; diffx report --help has examples")


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    given = _parsed(argv)
    out = Path(given.out).expanduser()
    if out.suffix not in (".html", ".htm"):
        raise DiffxError(f"--out {given.out} is no page; let it end in .html")
    figures = Path(given.figures).expanduser() if given.figures else out.with_name(f"{out.stem}_figures")
    collection = read_runs(*given.folders)
    if given.wanted:
        collection = collection.where(given.wanted)
    by = None if given.by is None else [axis for axis in given.by.split(",") if axis]
    verdicts = _verdicts(collection, given.metric, by, given.baseline, given.allow_mismatch)
    files = write_report(collection, verdicts, out, _command(given), given.title, given.question, figures)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"report   {files[0]} ({files[0].stat().st_size / 1e6:.1f} MB)")
    console.print(f"figures  {len(files) - 1} files in {figures}")
    return 0


def _parsed(argv: list[str]) -> argparse.Namespace:
    known = [*OPTIONS, FLAG]
    parser = _Parser(prog="diffx report", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for name, default in OPTIONS.items():
        parser.add_argument(name, default=default)
    parser.add_argument(FLAG, action="store_true")
    words = []
    for word in argv:
        name, sign, _ = word.partition("=")
        if word.startswith("-") and name not in known:
            raise DiffxError(f"there is no option '{name}'{nearest(name, known)}; diffx report has {', '.join(known)}")
        words.append(f"--{word}" if sign and f"--{name}" in OPTIONS else word)
    given = parser.parse_intermixed_args(words)
    # a run's folder has = in its name
    chosen = [word for word in given.words if "=" in word and not Path(word).exists()]
    given.folders = sorted({word for word in given.words if word not in chosen}) or ["runs"]
    given.wanted = {key: values.split(",") for key, _, values in (word.partition("=") for word in sorted(chosen))}
    return given


def _command(given: argparse.Namespace) -> str:
    """What makes the same page again, with the folders in one order."""
    words = ["diffx", "report", *given.folders, *(f"{key}={','.join(found)}" for key, found in given.wanted.items())]
    for name, default in OPTIONS.items():
        value = getattr(given, name.removeprefix("--"))
        words += [name, value] if value != default else []
    return shlex.join(words + [FLAG] * given.allow_mismatch)


def _verdicts(
    collection: Collection, metric: str | None, by: list[str] | None, baseline: str | None, allow_mismatch: bool
) -> Verdicts:
    """The comparison; where no training has been measured at its end yet, the arms alone."""
    if not final(collection)[0].measurements:
        return without_verdicts(collection, metric)
    # unless asked for, arms are compared as they are sampled by their own configs
    keys = by if by is not None else list(collection.axes) or None
    return verdicts_of(collection, compare(collection, metric, keys, baseline, allow_mismatch))
