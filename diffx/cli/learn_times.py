"""`diffx learn-times`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffx.cli.build import Arm, build, build_evaluator
from diffx.cli.measure import cell
from diffx.cli.sample import announce, device_of
from diffx.cli.trained import tasks
from diffx.discretizations import Learned
from diffx.discretizations.learned import save
from diffx.generate import Generator
from diffx.learn_discretization import HEURISTICS, LearnedTimes, learn_discretization
from diffx.metrics import Value, paired
from diffx.training.weights import load_weights
from diffx.utils import DiffxError, Keys

KEYS: dict[str, Any] = {"n": 256, "iterations": 20, "out": None, "device": "auto", "batch_size": 256}

_SEED = 2**31 - 1  # other noise than any evaluation's: times fitted to its samples would flatter them


def main(argv: list[str]) -> int:
    """Finds times for a trained run, saves them and says what they gain; returns the exit code."""
    (task, *others) = tasks(argv, "learn_times", KEYS)
    if others:
        raise DiffxError("times are learned for one run, sampler and number of steps at a time; name one of each")
    config, run = task.config, task.run
    console = Console(width=None if sys.stdout.isatty() else 120)
    steps = config["sampler"]["steps"]
    name = config["sampler"]["_target_"].rpartition(".")[2].lower()
    out = Path(config["out"] or run.path / "times" / f"{name}-{steps}.json").expanduser()
    if out.suffix != ".json":
        raise DiffxError(f"out={out} must end in .json")
    if config["n"] < 4:
        raise DiffxError(f"n={config['n']} samples are too few to fit times to and to measure them on; set n=256")
    device = torch.device(device_of(config))
    arm = build(config)
    announce(config, console)
    denoiser, _ = load_weights(arm.module.ema, config["weights"], run.weights.parent, run.newest_checkpoint()[0])
    generator = arm.generator(denoiser.to(device).eval())
    with console.status(f"learning {steps} times of {name} on {config['n']} samples: the exact solution") as status:
        found = _learn(generator, config, device, lambda said: status.update(f"learning {said}"))
    save(out, found.logsnr, found.report | {"run": str(run.path), "weights": config["weights"]})
    with console.status("measuring what samples on these times and on others are worth"):
        distances = _distances(arm, generator, out, device)
    console.print(table(f"{name}, {steps} steps, NFE {found.report['nfe']}", found.report["rms"], distances))
    console.print(
        f"times  {out}\nuse them: diffx evaluate run={run.path} sampler.steps={steps} discretization=learned "
        f"discretization.path={out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def table(title: str, errors: dict[str, float], distances: dict[str, Value]) -> Table:
    """What the learned times gain over others.

    Arguments:
        title: what they are times of.
        errors: by the name of the grid, the distance to the exact solution.
        distances: by the same names, the Fréchet distance of samples; empty where it is not measured.
    """
    captions = ["error: to the exact solution, root mean square per dimension, on samples the search has not seen"]
    if distances:
        captions.append("± one standard error; […] 95 % of the paired difference for n → ∞; ≈ not distinguishable")
    shown = Table(title=title, caption="\n".join(captions), title_justify="left", caption_justify="left")
    shown.add_column("times")
    shown.add_column("error", justify="right")
    shown.add_column("over the learned", justify="right")
    metric = next((value.name for value in distances.values()), "")
    if distances:
        shown.add_column(metric, justify="right", no_wrap=True)
        shown.add_column(f"{metric} − learned", no_wrap=True)
    for grid, error in sorted(errors.items(), key=lambda item: item[1]):
        further = ["", ""] if distances else []
        if grid in distances:
            further = [cell(distances[grid]), _difference(distances[grid], distances["learned"])]
        shown.add_row(grid, f"{error:.4g}", f"{error / errors['learned']:.2f} ×", *further)
    return shown


def _learn(
    generator: Generator, config: dict[str, Any], device: torch.device, say: Callable[[str], None]
) -> LearnedTimes:
    index = torch.arange(config["n"], device=device)
    noise = Keys(_SEED, index).normal("sample", *generator.shape)
    return learn_discretization(
        generator.denoiser,
        generator.sampler,
        noise,
        generator.steps,
        iterations=config["iterations"],
        batch_size=config["batch_size"],
        on_iteration=say,
        **generator.conditioner({"label": generator.labels(index)}),
    )


def _distances(arm: Arm, generator: Generator, learned: Path, device: torch.device) -> dict[str, Value]:
    """The Fréchet distance of the run's evaluation on each grid, from the same noise; empty where there is none."""
    config, metrics = arm.config, arm.config["metrics"]
    total = config["evaluation"]["num_samples"]
    if not total or not arm.evaluator.extractor.dim or "fd" not in metrics:
        return {}
    arm.source.check()
    evaluator = build_evaluator(config | {"metrics": {"fd": metrics["fd"]}}, arm.source)
    grids = {"learned": Learned(learned), **HEURISTICS}
    measured = {
        name: evaluator(replace(generator, discretization=grid), total, device).values for name, grid in grids.items()
    }
    return {name: value for name, values in measured.items() for value in values.values()}


def _difference(value: Value, learned: Value) -> str:
    if value is learned:
        return ""
    try:
        effect = paired(value, learned)
    except DiffxError:  # too few samples for a standard error
        return ""
    low, high = effect.interval
    return f"{effect.difference:+.3g} [{low:.3g}, {high:.3g}]" + ("" if effect.distinguishable else " ≈")
