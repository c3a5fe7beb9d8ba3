"""`diffx plan`: what a sweep would train, and what it would cost, before it is trained."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffx.cli.build import Arm, build, check_schedule
from diffx.cli.compose import as_dict, parse, sweep_points
from diffx.cli.estimate import SECONDS, Estimate, Gain, duration, estimate, gains, totals
from diffx.cli.grid import two_stages
from diffx.cli.measure import best_device
from diffx.cli.switches import variants
from diffx.cli.train import config_of
from diffx.experiment import Run, fingerprint, identity, locate
from diffx.objectives import ELBO, Denoising, Hybrid
from diffx.objectives.effective_weight import (
    EffectiveWeight,
    effective_weight,
    effective_weight_of_bound,
    effective_weight_of_steps,
)
from diffx.plots import Curve, plot_curves
from diffx.utils import DiffxError

LEVELS = (6.0, 3.0, 0.0, -3.0, -6.0)
"""logSNRs at which the table tells the effective weight."""


@dataclass(frozen=True)
class Planned:
    """An arm, whatever its seeds.

    Arguments:
        axes: what differs between the arms, `key=value`.
        seeds: the seeds it would be trained with.
        parameters: trainable parameters of the network.
        runs: the run of each seed, with its config.
        weight: its effective weight; None where the objective has none of this form.
        about: what has to be known of that weight, or why there is none.
        problem: why it cannot work; empty if it can.
    """

    axes: dict[str, str]
    seeds: list[int]
    parameters: int
    runs: list[tuple[Run, dict[str, Any]]]
    weight: EffectiveWeight | None = None
    about: str = ""
    problem: str = ""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 2 if an arm cannot work."""
    start_up = time.process_time()  # importing what a run imports too
    own = as_dict([word for word in argv if word.startswith(_OWN)])
    out, seconds = Path(own.get("out", "plan.png")).expanduser(), _seconds(own.get("probe", "true"))
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise DiffxError(f"out={out} is neither .png, .pdf nor .svg; choose one of them")
    arguments = two_stages(parse([word for word in argv if not word.startswith(_OWN)]))
    points = sweep_points(arguments.overrides, "train", arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.status("building the arms"):
        arms = plan(points, lambda point: config_of(point, arguments))
    console.print(table(arms))
    for sentence in verdicts(arms):
        console.print(f"• {sentence}", highlight=False)
    weights = {str(k + 1): arm.weight for k, arm in enumerate(arms) if arm.weight is not None}
    if weights:
        _draw(weights, arms, out)
        console.print(f"plot: {out}", highlight=False, soft_wrap=True)
    if seconds and any(arm.runs for arm in arms):
        with console.status("trying the arms out"):
            found = estimate([run for arm in arms for run in arm.runs], seconds, start_up)
        in_turn = iter(found)
        console.print(cost_table([[next(in_turn) for _ in arm.runs] for arm in arms]))
        for sentence in totals(found):
            console.print(f"• {sentence}", highlight=False)
    runs = [run for arm in arms for run in arm.runs]
    if runs:
        _tell_switches(runs[0][1], own.get("switches", "false"), seconds or SECONDS, console)
    return 2 if any(arm.problem for arm in arms) else 0


_OWN = ("out=", "probe=", "switches=")
"""Words that are no overrides."""


def _tell_switches(config: dict[str, Any], word: str, seconds: float, console: Console) -> None:
    """Names the switches for speed that the first arm leaves off, and, asked for, what each would gain."""
    if word.lower() not in ("true", "false"):
        raise DiffxError(f"switches={word} is neither true nor false; switches=true tries out what is off")
    names = [words for words, _ in variants(config, best_device(config["trainer"]["accelerator"]))]
    if word.lower() == "false":
        if names:
            console.print(f"• off: {', '.join(names)}; switches=true tries out what each gains here", highlight=False)
        return
    with console.status("trying the switches out"):
        console.print(gains_table(gains(config, seconds)))


def gains_table(tried: list[Gain]) -> Table:
    """What each switch gains.

    Arguments:
        tried: of one network; the first with none of them.
    """
    shown = Table(
        caption="one process on this machine, the first arm; start: seconds before steps are that fast, once per run",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("switched on")
    for name in ("images/s", "×", "memory", "×", "start"):
        shown.add_column(name, justify="right")
    base = tried[0]
    for gain in tried:
        if gain.problem:
            shown.add_row(gain.words, gain.problem)
            continue
        faster, larger = gain.images_per_second / base.images_per_second, gain.memory / max(base.memory, 1)
        memory = f"{gain.memory / 2**30:.2f} GiB"
        cells = (f"{gain.images_per_second:,.4g}", f"{faster:.2f}", memory, f"{larger:.2f}", duration(gain.start))
        shown.add_row(gain.words or "(as it is)", *cells)
    return shown


def plan(points: list[list[str]], config_of_point: Callable[[list[str]], dict[str, Any]]) -> list[Planned]:
    """The arms of a sweep; those that cannot be composed or built among them, with the reason."""
    typed = [as_dict(point) for point in points]
    varied = [
        key
        for key in dict.fromkeys(key for point in typed for key in point)
        if key != "seed" and len({point.get(key) for point in typed}) > 1
    ]
    found: dict[str, Planned] = {}
    for point, words in zip(points, typed, strict=True):
        axes = {key: words.get(key, "") for key in varied}
        try:
            config = config_of_point(point)
            key, seed = fingerprint(identity(config) | {"axes": axes}), config["seed"]
            if key not in found:
                arm = build(config)
                check_schedule(arm)
                parameters = sum(p.numel() for p in arm.module.denoiser.backbone.parameters())
                found[key] = Planned(axes, [], parameters, [], *_weight(arm))
            found[key].seeds.append(seed)
            found[key].runs.append((locate(config["runs_dir"], config, point), config))
        except DiffxError as error:
            found.setdefault(fingerprint(axes), Planned(axes, [], 0, [], problem=str(error)))
    return list(found.values())


def verdicts(arms: list[Planned]) -> list[str]:
    """Which arms are one objective, which differ by a constant, which cannot work, and what W leaves out."""
    sentences = [f"arm {k + 1} cannot work: {arm.problem}" for k, arm in enumerate(arms) if arm.problem]
    for about in dict.fromkeys(arm.about for arm in arms if arm.about):
        several = [str(k + 1) for k, arm in enumerate(arms) if arm.about == about]
        sentences.append(f"arm{'s' if len(several) > 1 else ''} {', '.join(several)}: {about}")
    said = len(sentences)
    left = [k for k, arm in enumerate(arms) if arm.weight is not None]
    while left:
        first = left.pop(0)
        weight = arms[first].weight
        assert weight is not None
        factors = {k: other.factor(weight) for k in left if (other := arms[k].weight) is not None}
        equal = [k for k, factor in factors.items() if factor is not None and abs(factor - 1) < 0.03]
        scaled = {k: factor for k, factor in factors.items() if factor is not None and k not in equal}
        if equal:
            names = ", ".join(str(k + 1) for k in (first, *equal))
            sentences.append(
                f"arms {names} minimise the same loss, written differently: what may still tell them apart is what the "
                "network is asked to output, not what is weighed"
            )
        for k, factor in scaled.items():
            sentences.append(
                f"arms {first + 1} and {k + 1} differ by the constant factor {factor:.3g} only: clipping of gradients "
                "sees it, Adam does not"
            )
        left = [k for k in left if k not in equal and k not in scaled]
    return sentences if len(sentences) > said or len(arms) == 1 else [*sentences, _ALL_DIFFER]


_ALL_DIFFER = "no two arms are the same objective"


def table(arms: list[Planned]) -> Table:
    """The arms with their effective weights, relative to logSNR 0."""
    shown = Table(
        caption="W: effective weight of ‖ε̂ − ε‖² per unit of logSNR λ, over W(0) (arXiv 2303.00848, Eq. 9)",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("arm", justify="right")
    for key in arms[0].axes:
        shown.add_column(key)
    for name in ("seeds", "parameters", "logSNR", *(f"W({level:+.0f})" for level in LEVELS)):
        shown.add_column(name, justify="right")
    for k, arm in enumerate(arms):
        cells = [str(k + 1), *arm.axes.values(), ",".join(map(str, arm.seeds))]
        if arm.problem:
            shown.add_row(*cells, "cannot work", style="red")
            continue
        cells.append(f"{arm.parameters:,}")
        if arm.weight is not None:
            values = arm.weight.at(torch.tensor(LEVELS, dtype=torch.float64))
            zero = values[LEVELS.index(0.0)]
            cells.append(f"{arm.weight.logsnr[0]:.1f} … {arm.weight.logsnr[-1]:.1f}")
            cells += ["–" if v != v else f"{v:.3g}" for v in (values / zero).tolist()]
        shown.add_row(*cells)
    return shown


def cost_table(costs: list[list[Estimate]]) -> Table:
    """What each arm takes, as far as it is not finished.

    Arguments:
        costs: for each arm those of its runs.
    """
    shown = Table(
        caption=f"tried out on this machine; each: one run; memory: {_MEMORY}; FLOP: a multiply-add is two",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("arm", "to do", "images/s", "memory", "GFLOP/image", "training", "evaluation", "each", "all hours"):
        shown.add_column(name, justify="right")
    for k, runs in enumerate(costs):
        open_ = [run for run in runs if not run.finished]
        cells = [str(k + 1), f"{len(open_)} of {len(runs)}"]
        first = next((run for run in open_ if run.cost and run.speed), None)
        if first is not None and first.cost and first.speed:
            hours = [run.cost.device_hours for run in open_ if run.cost]
            unit = "GPU" if first.device == "cuda" else "CPU"
            cells += [
                f"{first.images_per_second:,.4g}",
                f"{first.speed.memory / 2**30:.2f} GiB",
                f"{first.speed.flops / 1e9:.3g}",
                duration(first.cost.training),
                duration(first.cost.evaluation),
                duration(first.cost.seconds),
                f"{sum(hours):.3g} {unit}-h",
            ]
        shown.add_row(*cells)
    return shown


_MEMORY = "torch's on a GPU, the process's on a CPU"


def _seconds(word: str) -> float:
    """How long to try out, by `probe=`."""
    if word.lower() in ("true", "false"):
        return SECONDS if word.lower() == "true" else 0.0
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DiffxError(f"probe={word} is no time; give seconds, such as probe=10, or probe=false for no trial")
    return seconds


def _weight(arm: Arm) -> tuple[EffectiveWeight | None, str]:
    """The effective weight of an arm's loss, and what has to be known of it."""
    objective, denoiser = arm.module.objective, arm.module.denoiser
    if isinstance(objective, Denoising):
        return effective_weight(denoiser, objective.time_sampler, objective.weighting), ""
    if isinstance(objective, ELBO):
        shape = arm.module.autoencoder.latent_shape(arm.source.channels, arm.source.image_size)
        return effective_weight_of_bound(denoiser, objective.logsnr_max, math.prod(shape)), _BOUND
    if isinstance(objective, Hybrid):
        weight = effective_weight_of_steps(denoiser, objective.time_sampler, objective.weighting, objective.steps)
        return weight, _HYBRID
    return None, f"{type(objective).__name__} is no weighted error at each noise level: it has no W"


_BOUND = "W is that of the bound's integral; its two ends train a learned schedule at most, and no network"
_HYBRID = "W is that of the simple loss; the bound that is added trains the variances alone"


def _draw(weights: dict[str, EffectiveWeight], arms: list[Planned], out: Path) -> None:
    curves = {}
    for name, weight in weights.items():
        grid = torch.linspace(max(weight.logsnr[0].item(), -15), min(weight.logsnr[-1].item(), 15), 200).double()
        value = weight.at(grid)
        label = f"{name}: " + " ".join(arms[int(name) - 1].axes.values())
        curves[label.rstrip(": ")] = Curve(grid.tolist(), (value / weight.at(torch.zeros(()))).tolist())
    plot_curves(curves, out, "logSNR λ", "effective weight W(λ) / W(0)", log_y=True)
