"""Speed: `python benchmarks/run.py` prints tables of times per step and writes them as JSON. See README.md."""

import argparse
import gc
import importlib
import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from measure import CLOCKS, Case, Row, measure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PARTS = {
    "training": "training_step",
    "networks": "networks",
    "switches": "switches",
    "sampler": "sampler_step",
    "start-up": "start_up",
    "checkpoint": "checkpoint_stall",
    "noise": "keyed_noise",
    "evaluation": "evaluation",
    "loading": "loading",
}
"""The module of each part, of which `cases(quick, clock)` is called."""

OURS = ("diffx", *(file.stem for file in HERE.glob("*.py")))
PACKAGES = (
    "torch", "lightning", "diffusers", "accelerate", "denoising-diffusion-pytorch", "azula", "k-diffusion",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smallest shapes and few rounds: whether it runs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="some parts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time, on a busy machine")
    parser.add_argument("--output", type=Path, default=HERE / "results.json", help="the JSON file")
    parser.add_argument("--images", type=Path, help="loading: class folders of 32×32 JPEGs (default: drawn ones)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
    if not console.is_terminal:  # a file has room for all columns
        console = Console(width=140)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for part in arguments.only:
        # in a quick run what is compiled runs as it is: compiling takes minutes
        with torch.compiler.set_stance("force_eager" if arguments.quick else "default"):
            try:
                module: Any = importlib.import_module(PARTS[part])
                if part == "loading":
                    module.IMAGES = arguments.images
                for case in module.cases(arguments.quick, CLOCKS[arguments.clock]):
                    gc.freeze()  # what is there by now need not be searched for garbage before each measurement
                    rows += run(case, console)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] in OURS:
                    raise
                skipped[part] = f"{error.name} is not installed; make bench installs it"
                console.print(f"{part} left out: {skipped[part]}", highlight=False)
        gc.unfreeze()
        # after every part, so that a run that is cut short leaves what it has found
        write(arguments, rows, skipped)
    for group, members in groupby(rows, lambda row: row.group):
        console.print(table(group, list(members)))
    console.print(f"written to {arguments.output}", highlight=False, soft_wrap=True)


def write(arguments: argparse.Namespace, rows: list[Row], skipped: dict[str, str]) -> None:
    """The JSON file."""
    report = {
        "quick": arguments.quick,
        "clock": arguments.clock,
        **surroundings(),
        "skipped": skipped,
        "rows": [asdict(row) for row in rows],
    }
    arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(case: Case, console: Console) -> list[Row]:
    """Measures a case, and says so before."""
    # no spinner: it would take its share of the time
    console.print(f"{case.group.split(',')[0]}: {case.name}", style="dim", highlight=False)
    return measure(case)


def table(group: str, rows: list[Row]) -> Table:
    """One group, a section per case."""
    shown = Table(title=group, title_justify="left")
    shown.add_column("", min_width=30)
    further = list(dict.fromkeys(name for row in rows for name in row.extra))
    for column in ("median", "fastest", "slowest", "diff.", "ratio", *further):
        shown.add_column(column, justify="right", no_wrap=True)
    for case, members in groupby(rows, lambda row: row.case):
        shown.add_row(case, style="bold")
        for n, row in enumerate(members):
            numbers = [f"{value:,.1f}" for value in (row.median, row.smallest, row.largest)]
            against = [f"{row.difference:+,.1f}", f"{row.ratio:.3f}"] if n else ["", ""]
            extra = [f"{row.extra[name]:,.2f}" if name in row.extra else "" for name in further]
            shown.add_row(f"  {row.contender}", *numbers, *against, *extra)
        shown.add_section()
    return shown


def surroundings() -> dict[str, object]:
    """What the numbers depend on beside the code."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str:
    """The version of a package; empty if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit, with a `+` if files have changed since; empty outside a repository."""
    try:
        text = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=HERE, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=HERE, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return text + ("+" if changed else "")


def cpu() -> str:
    """The model of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
