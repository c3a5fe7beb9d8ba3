"""`diffx evaluate`."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from diffx.cli.build import Arm, asked, build
from diffx.cli.compose import as_dict, parse
from diffx.cli.figures import nfe_pictures
from diffx.cli.launch import launch
from diffx.cli.measure import Stopped, cell, evaluate, nfe_of, table
from diffx.cli.sample import announce, device_of
from diffx.cli.switches import switch_on
from diffx.cli.trained import Task, tasks
from diffx.denoisers import Denoiser
from diffx.evaluation import RULER, Evaluation, Evaluator
from diffx.experiment import Run
from diffx.metrics import paired
from diffx.training.processes import process_group
from diffx.training.weights import load_weights
from diffx.utils import DiffxError

KEYS: dict[str, Any] = {"device": "auto", "devices": 1}


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    given = as_dict(parse(argv).overrides)
    if "images" in given:
        from diffx.cli.evaluate_images import main as evaluate_images

        return evaluate_images(argv)
    if "repeat" in given:
        return repeat(Path(given["repeat"].strip("'\"")).expanduser(), argv)
    if "WORLD_SIZE" not in os.environ and given.get("devices", "1").isdigit() and int(given.get("devices", "1")) > 1:
        tasks(argv, "evaluate", KEYS)  # mistakes are told once, not by every process
        return launch(["-m", "diffx.cli.main", "evaluate", *argv], int(given["devices"]))
    wanted = given.get("device", "auto")
    with process_group(device_of({"device": wanted})) as (rank, world_size, device):
        # a table in a log file needs no terminal's width
        console = Console(quiet=rank > 0, width=None if sys.stdout.isatty() else 200)
        found = _agreed(lambda: tasks(argv, "evaluate", KEYS), rank, world_size)
        for task in found:
            if task.config["evaluation"]["num_samples"] < 1:
                raise DiffxError("evaluation.num_samples is 0; set evaluation.num_samples=N to evaluate")
        try:
            return _evaluate(found, console, device, rank, world_size)
        except Stopped as stopped:
            console.print(str(stopped), highlight=False)
            return 128 + stopped.signal


def repeat(file: Path, argv: list[str]) -> int:
    """Measures again what a record holds, from its own settings, and compares; 0 if the values agree."""
    others = [o for o in parse(argv).overrides if not o.startswith(("repeat=", "device="))]
    if others:
        raise DiffxError(f"repeat= takes its settings from the record; leave '{others[0]}' out")
    device = torch.device(device_of(KEYS | as_dict(parse(argv).overrides)))
    record, console = Evaluation.load(file), Console()
    run = Run(file.parent.parent)
    frozen = run.config()
    config = frozen | record.settings | {"trained_schedule": frozen["schedule"]}
    arm = build(config)
    switch_on(arm.module, config["trainer"], device, training=False)
    arm.source.check()
    denoiser, step = load_weights(arm.module.ema, config["weights"], run.weights.parent, run.newest_checkpoint()[0])
    if step != record.protocol["step"]:
        raise DiffxError(
            f"'{file}' measured the weights of step {record.protocol['step']}, but '{run.path}' holds those of step "
            f"{step}; evaluate them anew: diffx evaluate run={run.path}"
        )
    again, _ = evaluate(arm, run, denoiser, step, console, device, known=False)
    if again.fingerprint != record.fingerprint:
        changed = [key for key, value in again.protocol.items() if _json(value) != _json(record.protocol.get(key))]
        raise DiffxError(f"the protocol cannot be repeated here: {', '.join(changed)} changed since '{file}'")
    shown = Table(title=f"{file}", caption=f"protocol {record.fingerprint}", title_justify="left")
    for column in ("metric", "recorded", "repeated", "relative difference"):
        shown.add_column(column, justify="left" if column == "metric" else "right")
    worst = 0.0
    for name, value in record.values.items():
        now = again.values[name].value
        same = now == value.value or (math.isnan(now) and math.isnan(value.value))
        difference = 0.0 if same else abs(now - value.value) / max(abs(value.value), 1e-12)
        worst = max(worst, difference)
        shown.add_row(name, f"{value.value:.10g}", f"{now:.10g}", "equal" if same else f"{difference:.1e}")
    console.print(shown)
    # another device or number of threads rounds the network differently
    return 0 if worst <= 1e-3 else 1


def _evaluate(found: list[Task], console: Console, device: torch.device, rank: int, world_size: int) -> int:
    known: dict[str, Evaluator] = {}
    done: list[tuple[Task, Evaluation]] = []
    failed = 0
    arm: Arm | None = None
    loaded: tuple[Run, str] | None = None
    weights: tuple[Denoiser, int] | None = None
    for k, task in enumerate(found):
        if len(found) > 1:
            shown = " ".join([f"run={task.run.path}" if len({t.run.path for t in found}) > 1 else "", *task.overrides])
            console.print(f"[{k + 1}/{len(found)}] {shown.strip()}", highlight=False, soft_wrap=True, markup=False)
        if arm is None or loaded is None or loaded[0] is not task.run:
            arm, loaded = build(task.config), None
            switch_on(arm.module, task.config["trainer"], device, training=False)
            arm.source.check()
        if loaded != (task.run, task.config["weights"]) or weights is None:
            folder, checkpoint = task.run.weights.parent, task.run.newest_checkpoint()[0]
            weights = load_weights(arm.module.ema, task.config["weights"], folder, checkpoint)
            loaded = (task.run, task.config["weights"])
        announce(task.config, console)
        point = asked(arm, task.config, known)
        try:
            evaluation, file = evaluate(point, task.run, *weights, console, device, rank, world_size)
        except DiffxError as error:
            if len(found) == 1:
                raise
            print(f"diffx: {error}", file=sys.stderr)
            failed += 1
            continue
        done.append((task, evaluation))
        if len(found) == 1:
            console.print(table(evaluation))
        console.print(f"evaluation  {file}", highlight=False, soft_wrap=True)
    if len(found) > 1 and rank == 0 and done:
        console.print(summary(done))
        _draw(done, console)
    return 2 if failed else 0


def summary(done: list[tuple[Task, Evaluation]]) -> Table:
    """The points of a sweep as rows, with what differs between them and what they reached.

    Rows whose Fréchet distance cannot be told from the best one's, by the paired jackknife over equal noise, are
    marked.
    """
    axes = _axes([task for task, _ in done])
    metrics = [name for name in done[0][1].values if not name.endswith(("_floor", "_noise", "_heldout", "nfe"))]
    leading = next((name for name in metrics if name.startswith(("fid", "fd_"))), None)
    found = [evaluation for _, evaluation in done if leading in evaluation.values]
    finite = [evaluation for evaluation in found if leading and math.isfinite(evaluation.values[leading].value)]
    best = min(finite, key=lambda evaluation: evaluation.values[leading or ""].value, default=None)
    shown = Table(title_justify="left", caption_justify="left")
    for column in (*axes, "NFE"):
        shown.add_column(column)
    for name in metrics:
        shown.add_column(name, justify="right", no_wrap=True)
    if best is not None:
        shown.add_column(f"{leading} − best")
        shown.caption = "± one standard error; […] 95 % of the paired difference for n → ∞; ≈ not distinguishable"
    for (_, evaluation), *cells in zip(done, *axes.values(), strict=True):
        values = [evaluation.values.get(name) for name in metrics]
        texts = ["" if value is None else cell(value) for value in values]
        verdict = [_verdict(evaluation, leading, best)] if best is not None else []
        shown.add_row(*cells, f"{nfe_of(evaluation):.4g}", *texts, *verdict)
    return shown


def _verdict(evaluation: Evaluation, leading: str | None, best: Evaluation) -> str:
    value = evaluation.values.get(leading or "")
    if value is None:
        return ""
    if evaluation is best:
        return "best"
    if any(evaluation.protocol[key] != best.protocol[key] for key in RULER):
        return "measured otherwise: not comparable"
    try:
        effect = paired(value, best.values[leading or ""])
    except DiffxError:  # too few images for a standard error
        return ""
    low, high = effect.interval
    return f"{effect.difference:+.3g} [{low:.3g}, {high:.3g}]" + ("" if effect.distinguishable else " ≈")


def _axes(found: list[Task]) -> dict[str, list[str]]:
    """What differs between tasks: the run, and the overrides that are not the same everywhere."""
    axes: dict[str, list[str]] = {}
    paths = [str(task.run.path) for task in found]
    if len(set(paths)) > 1:
        shared = os.path.commonpath([os.path.abspath(p) for p in paths])  # noqa: PTH100
        axes["run"] = [os.path.relpath(p, shared) for p in paths]
    typed = [as_dict(task.overrides) for task in found]
    for key in dict.fromkeys(key for point in typed for key in point):
        values = [point.get(key, "") for point in typed]
        if len(set(values)) > 1:
            axes[key] = values
    return axes


def _draw(done: list[tuple[Task, Evaluation]], console: Console) -> None:
    """Metrics over NFE; a line for each combination of what differs beside the steps."""
    by_run: dict[Path, list[tuple[Task, Evaluation]]] = {}
    for task, evaluation in done:
        by_run.setdefault(task.run.path, []).append((task, evaluation))
    for points in by_run.values():
        axes = _axes([task for task, _ in points])
        axes.pop("sampler.steps", None)
        names = [" ".join(cells) for cells in zip(*axes.values(), strict=True)] or [""] * len(points)
        for file in nfe_pictures([(e, nfe_of(e)) for _, e in points], names, points[0][0].run.evaluations):
            console.print(f"plot        {file}", highlight=False, soft_wrap=True)


def _agreed(find: Any, rank: int, world_size: int) -> list[Task]:
    """What the first process finds: the others might see a run or a file that has appeared meanwhile."""
    if world_size == 1:
        return find()
    box: list[Any] = [None]
    if rank == 0:
        try:
            box = [find()]
        except DiffxError as error:
            box = [str(error)]
    dist.broadcast_object_list(box)
    if isinstance(box[0], str):
        raise DiffxError(box[0])
    return box[0]


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
