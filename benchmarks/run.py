"""Speed: `python benchmarks/run.py` prints tables of times per step and writes them as JSON. See README.md."""

import argparse
import gc
import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import evaluation
import keyed_noise
import loading
import sampler_step
import torch
import training_step
from measure import CLOCKS, Row, measure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PARTS = {
    "training": training_step.cases,
    "sampler": sampler_step.cases,
    "noise": keyed_noise.cases,
    "evaluation": evaluation.cases,
    "loading": loading.cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds: whether it runs, not how fast")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time, on a busy machine")
    parser.add_argument("--output", type=Path, default=HERE / "results.json", help="the JSON file")
    parser.add_argument("--images", type=Path, help="loading: class folders of 32×32 JPEGs (default: drawn ones)")
    arguments = parser.parse_args()
    loading.IMAGES = arguments.images
    torch.set_num_threads(arguments.threads)
    gc.freeze()  # what is imported need not be searched for garbage before each measurement
    console = Console()
    parts = [PARTS[arguments.only]] if arguments.only else list(PARTS.values())
    rows: list[Row] = []
    for cases in parts:
        for case in cases(arguments.quick, CLOCKS[arguments.clock]):
            # no spinner: it would take its share of the time
            console.print(f"{case.group.split(',')[0]}: {case.name}", style="dim", highlight=False)
            rows += measure(case)
    gc.unfreeze()
    for group, members in groupby(rows, lambda row: row.group):
        console.print(table(group, list(members)))
    report = {
        "quick": arguments.quick,
        "clock": arguments.clock,
        **surroundings(),
        "rows": [asdict(row) for row in rows],
    }
    arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.output}", highlight=False, soft_wrap=True)


def table(group: str, rows: list[Row]) -> Table:
    """One group, a section per case."""
    shown = Table(title=group, title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("median", "fastest", "slowest", "diff.", "ratio"):
        shown.add_column(column, justify="right", no_wrap=True)
    for case, members in groupby(rows, lambda row: row.case):
        shown.add_row(case, style="bold")
        for n, row in enumerate(members):
            numbers = [f"{value:,.1f}" for value in (row.median, row.smallest, row.largest)]
            against = [f"{row.difference:+,.1f}", f"{row.ratio:.2f}"] if n else ["", ""]
            shown.add_row(f"  {row.contender}", *numbers, *against)
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
        **{name: version(name) for name in ("torch", "lightning", "diffusers")},
    }


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
