"""`diffx plan`: what a sweep would train, before it is trained."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffx.cli.build import Arm, build
from diffx.cli.compose import as_dict, parse, sweep_points
from diffx.cli.train import config_of
from diffx.experiment import fingerprint, identity
from diffx.objectives import Denoising
from diffx.objectives.effective_weight import EffectiveWeight, effective_weight
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
        weight: its effective weight; None where the objective has none of this form.
        problem: why it cannot work; empty if it can.
    """

    axes: dict[str, str]
    seeds: list[int]
    parameters: int
    weight: EffectiveWeight | None
    problem: str = ""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 2 if an arm cannot work."""
    out = next((word.removeprefix("out=") for word in argv if word.startswith("out=")), "plan.png")
    arguments = parse([word for word in argv if not word.startswith("out=")])
    points = sweep_points(arguments.overrides, "train", arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.status("building the arms"):
        arms = plan(points, lambda point: config_of(point, arguments))
    console.print(table(arms))
    for sentence in verdicts(arms):
        console.print(f"• {sentence}", highlight=False)
    weights = {str(k + 1): arm.weight for k, arm in enumerate(arms) if arm.weight is not None}
    if weights:
        _draw(weights, arms, Path(out).expanduser())
        console.print(f"plot: {out}", highlight=False, soft_wrap=True)
    return 2 if any(arm.problem for arm in arms) else 0


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
                parameters = sum(p.numel() for p in arm.module.denoiser.backbone.parameters())
                found[key] = Planned(axes, [], parameters, _weight(arm))
            found[key].seeds.append(seed)
        except DiffxError as error:
            found.setdefault(fingerprint(axes), Planned(axes, [], 0, None, str(error)))
    return list(found.values())


def verdicts(arms: list[Planned]) -> list[str]:
    """Which arms are one objective, which differ by a constant, and which cannot work."""
    sentences = [f"arm {k + 1} cannot work: {arm.problem}" for k, arm in enumerate(arms) if arm.problem]
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
                f"arms {first + 1} and {k + 1} differ by the constant factor {factor:.3g} only, which Adam does not see"
            )
        left = [k for k in left if k not in equal and k not in scaled]
    return sentences or ["no two arms are the same objective"]


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


def _weight(arm: Arm) -> EffectiveWeight | None:
    objective = arm.module.objective
    if not isinstance(objective, Denoising):
        return None
    return effective_weight(arm.module.denoiser, objective.time_sampler, objective.weighting)


def _draw(weights: dict[str, EffectiveWeight], arms: list[Planned], out: Path) -> None:
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise DiffxError(f"out={out} is neither .png, .pdf nor .svg; choose one of them")
    curves = {}
    for name, weight in weights.items():
        grid = torch.linspace(max(weight.logsnr[0].item(), -15), min(weight.logsnr[-1].item(), 15), 200).double()
        value = weight.at(grid)
        label = f"{name}: " + " ".join(arms[int(name) - 1].axes.values())
        curves[label.rstrip(": ")] = Curve(grid.tolist(), (value / weight.at(torch.zeros(()))).tolist())
    plot_curves(curves, out, "logSNR λ", "effective weight W(λ) / W(0)", log_y=True)
