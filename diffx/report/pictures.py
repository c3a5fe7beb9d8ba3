"""The sample grids of every arm, at the same noise side by side."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffx.experiment import Member
from diffx.report.arms import Arm
from diffx.report.numbers import count, listed

BYTES = 6_000_000
"""What all pictures of a page may take, as PNG; more steps than fit are thinned out."""


@dataclass(frozen=True)
class Picture:
    """One grid.

    Arguments:
        step: the training step.
        data: the PNG as a data URI.
        width: in pixels.
        height: in pixels.
        alt: what it shows.
    """

    step: int
    data: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Strip:
    """The grids of one arm over training.

    Arguments:
        arm: the arm.
        seed: whose grids they are.
        pictures: in the order of their steps.
    """

    arm: Arm
    seed: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """The grids of all arms.

    Arguments:
        strips: one per arm that has pictures.
        steps: the steps between which the reader chooses.
        remarks: what is missing or differs, one sentence each.
        same_noise: whether all start from the same noise.
    """

    strips: list[Strip]
    steps: list[int]
    remarks: list[str]
    same_noise: bool


def gallery(arms: Sequence[Arm]) -> Gallery:
    """The grids of one seed of each arm, the same seed as far as it has pictures.

    Arguments:
        arms: the arms.
    """
    seeds = [member.seed for arm in arms for member in arm.members if _files(member)]
    favourite = min(set(seeds), key=lambda seed: (-seeds.count(seed), seed)) if seeds else 0
    shown, remarks = [], []
    for arm in arms:
        having = [member for member in arm.members if _files(member)]
        if having:
            member = min(having, key=lambda member: (member.seed != favourite, member.seed))
            shown.append((arm, member, _files(member)))
    steps = sorted({step for _, _, files in shown for step in files})
    kept = _thinned(steps, [files for _, _, files in shown])
    if len(kept) < len(steps):
        remarks.append(
            f"{len(kept)} of {len(steps)} steps are shown, to keep this page small; the run directories have all."
        )
    bare = [arm.label for arm in arms if all(arm is not other for other, _, _ in shown)]
    if bare:
        remarks.append(f"No pictures of {'; '.join(bare)}: {'its' if len(bare) == 1 else 'their'} runs have none yet.")
    others = [f"{arm.label} (seed {member.seed})" for arm, member, _ in shown if member.seed != favourite]
    if others:
        remarks.append(f"All grids are of training seed {favourite}, except for those of {'; '.join(others)}.")
    elif shown:
        remarks.append(f"All grids are of training seed {favourite}.")
    noises = {member.config.get("evaluation", {}).get("seed") for _, member, _ in shown}
    if len(noises) > 1:
        remarks.append("The grids do not start from the same noise: evaluation.seed differs between arms.")
    strips, broken = [], []
    for arm, member, files in shown:
        pictures = []
        for step in kept:
            if step not in files:
                continue
            picture = _picture(files[step], arm, step)
            broken += [files[step]] if picture is None else []
            pictures += [] if picture is None else [picture]
        if pictures:
            strips.append(Strip(arm, member.seed, pictures))
    if broken:
        remarks.append(f"{count(len(broken), 'picture')} cannot be read: {listed([str(file) for file in broken])}.")
    having = [step for step in kept if any(p.step == step for strip in strips for p in strip.pictures)]
    return Gallery(strips, having, remarks, len(noises) < 2)


def _files(member: Member) -> dict[int, Path]:
    """The grids of a run by their steps."""
    found = {}
    for file in sorted(member.run.samples.glob("step=*.png")):
        digits = file.stem.removeprefix("step=")
        if digits.isdigit():
            found[int(digits)] = file
    final = member.run.samples / "final.png"
    if final.is_file():
        last = member.status.get("step") or member.config["training"]["max_steps"]
        found[int(last)] = final
    return found


def _thinned(steps: list[int], strips: Sequence[dict[int, Path]]) -> list[int]:
    """Evenly chosen steps whose pictures fit, the last always among them."""
    size = {step: sum(files[step].stat().st_size for files in strips if step in files) for step in steps}
    for n in range(len(steps), 1, -1):
        kept = [steps[round(k * (len(steps) - 1) / (n - 1))] for k in range(n)]
        if sum(size[step] for step in kept) <= BYTES:
            return kept
    return steps[-1:]


def _picture(file: Path, arm: Arm, step: int) -> Picture | None:
    try:
        content = file.read_bytes()
        with Image.open(file) as image:
            image.verify()
            width, height = image.size
    except (OSError, SyntaxError):  # PIL calls a broken PNG a syntax error
        return None
    alt = f"Grid of samples of {arm.label} at step {step:,}"
    return Picture(step, f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height, alt)
