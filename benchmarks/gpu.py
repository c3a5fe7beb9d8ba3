"""Speed on a GPU: `python benchmarks/gpu.py` prints tables and writes them as JSON. See README.md."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_sampling import MODES, sample
from gpu_training import MODELS, Device, best_batch, fastest, flops_per_image, stall, switches, train
from rich.console import Console
from rich.table import Table
from run import HERE, surroundings

PARTS = ("training", "sampling", "checkpoint")
SAMPLED = "dit_xl_2"
SAMPLING_BATCH = 32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the lines out")
    parser.add_argument("--quick", action="store_true", help="small networks and few steps: whether it runs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some parts")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="training: some networks")
    parser.add_argument("--batch", type=int, help="training: images per step (default: by network)")
    parser.add_argument("--output", type=Path, default=HERE / "results_gpu.json", help="the JSON file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sentence = "benchmarks/gpu.py needs a GPU, and PyTorch finds none; try it out with --device cpu --quick"
        print(sentence, file=sys.stderr)
        return 2
    # a quick run compiles nothing: that takes minutes
    with torch.compiler.set_stance("force_eager" if arguments.quick else "default"):
        _run(arguments, Device(arguments.device))
    return 0


def _run(arguments: argparse.Namespace, device: Device) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    report: dict[str, Any] = {"quick": arguments.quick, "device": device.name, "cuda": torch.version.cuda}
    report |= surroundings()

    def keep(**rows: Any) -> None:
        # after every part, so that a run that is cut short leaves what it has found
        report.update(rows)
        arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    rate = matrix_rate(device, arguments.quick)
    keep(matrix_rate_flops=rate)
    console.print(f"{device.name}: bf16 matrix products at {rate / 1e12:,.1f} TFLOP/s", highlight=False)
    trained: list[dict[str, Any]] = []
    for name in arguments.models if "training" in arguments.only else ():
        trained += training(name, rate, arguments, device, console)
        keep(training=trained)
        console.print(table(f"training {name}", TRAINING, [row for row in trained if row["model"] == name]))
    if "sampling" in arguments.only:
        batch = 2 if arguments.quick else SAMPLING_BATCH
        rows = []
        for mode in MODES:
            say(console, f"sampling, compile={mode}")
            rows += attempt(lambda m=mode: sample(SAMPLED, MODELS[SAMPLED], m, batch, device, arguments.quick),
                            {"compile": mode}, arguments.quick)  # fmt: skip
        keep(sampling=rows)
        console.print(table(f"sampling {SAMPLED}, 50 steps, guidance", SAMPLING, rows))
    if "checkpoint" in arguments.only:
        say(console, "checkpoint")
        rows = attempt(lambda: [stall(SAMPLED, MODELS[SAMPLED], device, arguments.quick)], {}, arguments.quick)
        keep(checkpoint=rows)
        console.print(table(f"checkpoints while training {SAMPLED}", CHECKPOINT, rows))
    console.print(f"written to {arguments.output}", highlight=False, soft_wrap=True)


def training(
    name: str, rate: float, arguments: argparse.Namespace, device: Device, console: Console
) -> list[dict[str, Any]]:
    """The rows of a network: the switches at one batch, then the best batch with all that make a step faster."""
    model, quick = MODELS[name], arguments.quick
    batch = 2 if quick else arguments.batch or model.batch
    flops = flops_per_image(name, model, device, quick)
    rows = []
    for switched in switches(model):
        say(console, f"{name}: {switched.name}")
        rows += attempt(lambda s=switched: [train(name, model, s, batch, device, quick)],
                        {"model": name, "switches": switched.name, "batch": batch}, quick)  # fmt: skip
    say(console, f"{name}: the best batch")
    rows += attempt(lambda: [best_batch(name, model, device, quick, batch)],
                    {"model": name, "switches": f"{fastest(model).name}, the best batch"}, quick)  # fmt: skip
    for row in rows:
        row["flops_per_image"] = flops
        if "images_per_second" in row:
            row["utilisation"] = row["images_per_second"] * flops / rate
    return rows


def attempt(
    measurement: Callable[[], list[dict[str, Any]]], known: dict[str, Any], strict: bool
) -> list[dict[str, Any]]:
    """The rows of a measurement; where it fails, one that says why, so that hours of others are not lost."""
    try:
        return [known | row for row in measurement()]
    except torch.OutOfMemoryError:
        return [known | {"problem": "out of memory"}]
    except Exception as error:
        if strict:
            raise
        return [known | {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}]


def matrix_rate(device: Device, quick: bool) -> float:
    """Floating point operations per second of bf16 matrix products, of the size at which they are fastest."""
    best, calls = 0.0, 3 if quick else 30
    for n in (128,) if quick else (4096, 8192, 16384):
        a, b = torch.randn(2, n, n, device=device.kind, dtype=torch.bfloat16)
        for _ in range(3):
            torch.mm(a, b)
        started = device.clock()
        for _ in range(calls):
            torch.mm(a, b)
        best = max(best, 2 * n**3 * calls / (device.clock() - started))
    return best


TRAINING = {
    "switches": "",
    "batch": "batch",
    "images_per_second": "img/s",
    "utilisation": "of the matrix rate",
    "peak_gib": "peak GiB",
    "synchronisations_per_step": "waits/step",
    "first_step_seconds": "first step, s",
    "problem": "",
}
SAMPLING = {
    "compile": "compile",
    "what": "",
    "batch": "batch",
    "images_per_second": "img/s",
    "share_of_network_alone": "of the network alone",
    "synchronisations_per_step": "waits/step",
    "problem": "",
}
CHECKPOINT = {
    "ms_per_step": "ms per step",
    "longest_pause_ms": "longest pause, ms",
    "added_ms": "all that it adds, ms",
    "problem": "",
}
"""The columns of the tables: the key of a row, and the heading."""


def table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> Table:
    """Some of the rows' numbers."""
    shown = Table(title=title, title_justify="left")
    for key, heading in columns.items():
        numeric = key not in ("switches", "what", "problem")
        shown.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(_text(key, row.get(key, "")) for key in columns))
    return shown


def _text(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if key in ("utilisation", "share_of_network_alone") else f"{value:,.1f}"


def say(console: Console, what: str) -> None:
    """What is measured now, and since when."""
    console.print(f"{time.strftime('%H:%M:%S')} {what}", style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
