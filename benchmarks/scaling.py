"""Images per second on 1, 2, … processes at one global batch: `python benchmarks/scaling.py [--processes 1 2]`."""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ARM = [
    "trainer=cpu",
    "evaluation.every_n_steps=0",
    "evaluation.num_samples=0",
    "evaluation.per_class=1",
    "log_every_n_steps=20",
    "progress_bar=false",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", help="of diffx train, such as backbone=unet_28 trainer=gpu")
    arguments = parser.parse_args()
    speeds: dict[int, list[float]] = {count: [] for count in arguments.processes}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(arguments.rounds):  # interleaved: the machine's mood is that of all
            for count, found in speeds.items():
                words = [
                    *ARM,
                    *arguments.overrides,
                    f"trainer.devices={count}",
                    f"training.max_steps={arguments.steps}",
                ]
                found += train([*words, f"runs_dir={folder}/{k}-{count}"], Path(folder) / f"{k}-{count}")
    shown = Table(title=f"images per second, global batch as configured: {' '.join(arguments.overrides) or 'digits'}")
    for name in ("processes", "median", "slowest", "fastest", "ratio", "efficiency"):
        shown.add_column(name, justify="right")
    base = statistics.median(speeds[arguments.processes[0]]) / arguments.processes[0]
    for count, found in speeds.items():
        median = statistics.median(found)
        numbers = (median, min(found), max(found))
        ratio = median / base
        shown.add_row(str(count), *(f"{n:,.0f}" for n in numbers), f"{ratio:.2f}", f"{ratio / count:.0%}")
    Console().print(shown)


def train(words: list[str], folder: Path) -> list[float]:
    """The speeds that one run has logged, without its first window."""
    subprocess.run([sys.executable, "-m", "diffx.cli.main", "train", *words], check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*/*/*/metrics.csv")
    with file.open(newline="") as opened:
        return [float(row["images_per_second"]) for row in csv.DictReader(opened) if row["images_per_second"]][1:]


if __name__ == "__main__":
    main()
