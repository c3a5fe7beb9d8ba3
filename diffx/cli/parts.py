"""`diffx parts`: every part with its formula, source and defaults, from the docstrings and the YAML files."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markdown import Markdown

from diffx.cli.paths import config_dir, groups
from diffx.cli.types import locate_target
from diffx.plots import Curve, plot_curves
from diffx.utils import DiffxError, nearest, write_text

GROUPS = {
    "schedule": "Schedules",
    "parameterization": "Parameterizations",
    "weighting": "Weightings",
    "time_sampler": "Training time densities",
    "augmentation": "Augmentations",
    "objective": "Objectives",
    "sampler": "Samplers",
    "discretization": "Discretizations",
    "guidance": "Guidance",
    "thresholding": "Thresholding",
    "denoiser": "Denoisers",
    "likelihood": "Likelihoods",
    "metrics": "Metrics",
    "extractor": "Extractors",
}
"""The groups that the reference page describes, in the order of a training and an evaluation."""


@dataclass(frozen=True)
class Part:
    """One choice of a group.

    Arguments:
        name: how it is chosen.
        comment: the first line of its file: what it is, and where it comes from.
        summary: the first sentence of its docstring.
        body: the paragraphs up to the arguments, with formula and source, and those of the objects it is given.
        when: what follows "Use it when".
        defaults: `key=value` as in the YAML file.
    """

    name: str
    comment: str
    summary: str
    body: str
    when: str
    defaults: str


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    options = {key: value for key, equals, value in (word.partition("=") for word in argv) if equals}
    chosen = [word for word in argv if "=" not in word] or list(GROUPS)
    for word in (*chosen, *options):
        known = [*GROUPS] if word in chosen else ["out", "plots"]
        if word not in known:
            raise DiffxError(f"'{word}' is none of {', '.join(known)}{nearest(word, known)}")
    text = page(chosen)
    if "plots" in options:
        for file in plots(Path(options["plots"]).expanduser()):
            print(file)
    if "out" in options:
        write_text(Path(options["out"]).expanduser(), text)
        print(options["out"])
    elif "plots" not in options:
        Console().print(Markdown(text))
    return 0


def page(chosen: list[str]) -> str:
    """The reference as Markdown."""
    lines = [
        "# The parts",
        "",
        "Written by `diffx parts out=docs/parts.md` from docstrings and `configs/`; plots by `diffx parts plots=DIR`.",
        "`diffx train GROUP=CHOICE GROUP.KEY=VALUE` chooses; any goes with any, unless the message says why not.",
        "x_t = α(t)·x + σ(t)·z; SNR = α²/σ²; λ = logSNR; x̂ is the denoiser's estimate, F the network's output.",
    ]
    for group in chosen:
        found = parts(group)
        lines += ["", f"## {GROUPS[group]}: `{group}=`", "", "| choice | what it is | use it when |", "|---|---|---|"]
        lines += [f"| [`{p.name}`](#{group}{p.name}) | {_cell(p.comment)} | {_cell(p.when)} |" for p in found]
        for part in found:
            lines += ["", f'### <a id="{group}{part.name}"></a>`{group}={part.name}`', "", f"**{part.summary}**"]
            lines += [f"Defaults: {part.defaults}."] if part.defaults else []
            lines += ["", part.body] if part.body else []
    return "\n".join(lines) + "\n"


def parts(group: str) -> list[Part]:
    """The choices of a group, as their files and docstrings describe them."""
    return [_part(group, choice) for choice in groups()[group]]


def _part(group: str, choice: str) -> Part:
    text = (config_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8")
    node = yaml.safe_load(text)
    comment = text.partition("\n")[0].removeprefix("#").strip()
    if not node:
        return Part(choice, comment, "Nothing.", "", "", "")
    if "_target_" not in node:  # a group of which several can be chosen: the node lies below its name
        node = node[choice]
    summary, body = _docstring(node["_target_"], group)
    when = re.search(r"Use it (.*?)(?:\.(?=\s|$))", " ".join(body.split()))
    defaults = {key: value for key, value in node.items() if not key.startswith("_") and not isinstance(value, dict)}
    for key, below in node.items():
        if isinstance(below, dict) and "_target_" in below:
            defaults[key] = below["_target_"].rpartition(".")[2]
            defaults |= {f"{key}.{inner}": value for inner, value in below.items() if inner != "_target_"}
            inner_summary, inner_body = _docstring(below["_target_"], group)
            body += f"\n\nIts `{key}`: {inner_summary[0].lower()}{inner_summary[1:]}\n\n{inner_body}"
    shown = ", ".join(f"`{key}={'null' if value is None else value}`" for key, value in defaults.items())
    return Part(choice, comment, summary, body.strip(), when.group(1).removeprefix("when ") if when else "", shown)


def _docstring(target: str, group: str) -> tuple[str, str]:
    """The first sentence of what a `_target_` names, and the paragraphs up to its arguments."""
    text = inspect.cleandoc(_documented(target, group).__doc__ or "")
    summary, _, rest = text.partition("\n\n")
    body = re.split(r"\n\n(?:Arguments|Attributes|Returns|Raises|Yields):\n", "\n\n" + rest)[0]
    return " ".join(summary.split()), body.strip()


def _documented(target: str, group: str) -> Any:
    """What a `_target_` names: the class, or a function; a constructor of another name stands for its class."""
    found = locate_target(target, group)
    owner = getattr(found, "__self__", None)
    return owner if inspect.isclass(owner) else found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def plots(directory: Path) -> list[Path]:
    """Schedules over time, weightings and densities over logSNR, as PNG files."""
    from hydra.utils import instantiate

    from diffx.denoisers import Preconditioned
    from diffx.objectives.effective_weight import effective_weight

    def built(group: str, choice: str) -> Any:
        node = yaml.safe_load((config_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8"))
        return instantiate(node)

    cosine = built("schedule", "cosine")
    denoiser = Preconditioned(torch.nn.Identity(), cosine, built("parameterization", "v"))
    uniform, unit = built("time_sampler", "uniform"), built("weighting", "snr")
    t = torch.linspace(0.001, 0.999, 300, dtype=torch.float64)
    schedules, weightings, densities = {}, {}, {}
    with torch.no_grad():
        for choice in groups()["schedule"]:
            schedules[choice] = Curve(t.tolist(), built("schedule", choice).logsnr(t).tolist())
        for choice in groups()["weighting"]:
            weightings[choice] = _normed(effective_weight(denoiser, uniform, built("weighting", choice)))
        for choice in groups()["time_sampler"]:
            # w = SNR cancels: what remains is the density of logSNR
            densities[choice] = _normed(effective_weight(denoiser, built("time_sampler", choice), unit))
    files = [directory / f"{name}.png" for name in ("schedules", "weightings", "densities")]
    plot_curves(schedules, files[0], "time t", "logSNR")
    plot_curves(
        weightings, files[1], "logSNR λ (cosine schedule, v, uniform times)", "effective weight W(λ) / W(0)", log_y=True
    )
    plot_curves(
        densities, files[2], "logSNR λ (cosine schedule)", "density of the training times, over that at 0", log_y=True
    )
    return files


def _normed(weight: Any) -> Curve:
    low, high = max(weight.logsnr[0].item(), -15), min(weight.logsnr[-1].item(), 15)
    grid = torch.linspace(low, high, 300, dtype=torch.float64)
    value = weight.at(grid).nan_to_num()
    return Curve(grid.tolist(), (value / weight.at(torch.zeros(()))).tolist())
