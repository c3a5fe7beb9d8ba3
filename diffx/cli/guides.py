"""Trained runs as guides of others."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffx.cli.build import build_denoiser, make
from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser
from diffx.experiment import Run
from diffx.experiment.run import step_of
from diffx.guidance import Autoguidance, Rule, ToldNothing
from diffx.training import EMA
from diffx.training.weights import load_weights
from diffx.utils import DiffxError


def autoguidance(
    denoiser: Denoiser,
    conditioner: Conditioner,
    run: str,
    step: int | None = None,
    weights: str = "ema",
    scale: float = 2.0,
    interval: Sequence[float] | None = None,
    rescale: float = 0.0,
    rule: Rule | None = None,
    images: Sequence[int] | None = None,
) -> Autoguidance:
    """Autoguidance by a trained run; see `diffx.guidance.Autoguidance`.

    A guide trained without conditions is told none.

    Arguments:
        denoiser: the denoiser that is guided.
        conditioner: its conditioner.
        run: the guide's run directory.
        step: the step of the guide's checkpoint; None is its final weights or, of an unfinished run, its newest one.
        weights: which of its weights: `ema`, `ema_<decay>` or `best`.
        scale: the guidance scale; 1 is unguided.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        rescale: how far the contrast of the unguided estimate is restored, in [0, 1].
        rule: how the two estimates are combined; None is `diffx.guidance.Linear`.
        images: channels and size in pixels of the images, to compare with the guide's; None is not compared.

    Raises:
        DiffxError: if there is no such run or step, or it was trained on other images or classes.
    """
    chosen = Run(Path(run).expanduser())
    config = chosen.config()
    theirs = [config["data"]["channels"], config["data"]["image_size"]]
    if images is not None and list(images) != theirs:
        raise DiffxError(
            f"guidance.run={run} was trained on images of {theirs[0]}x{theirs[1]}x{theirs[1]}, and these are "
            f"{images[0]}x{images[1]}x{images[1]}; choose a run on the same data"
        )
    told: Conditioner = make(config, "conditioning")
    null, null_ours = ({name: value.tolist() for name, value in c.null(1).items()} for c in (told, conditioner))
    if null and null != null_ours:
        raise DiffxError(
            f"guidance.run={run} was trained with other classes or conditions than these; choose a run with the same, "
            "or one without any"
        )
    guide = trained_denoiser(chosen, step, weights)
    return Autoguidance(denoiser, guide if null else ToldNothing(guide, told), scale, interval, rescale, rule)


def trained_denoiser(run: Run, step: int | None = None, weights: str = "ema") -> Denoiser:
    """A denoiser of a run, frozen and in evaluation mode, on the CPU.

    Arguments:
        run: the run.
        step: the step of a checkpoint; None is the final weights or, of an unfinished run, its newest checkpoint.
        weights: which weights: `ema`, `ema_<decay>` or `best`.

    Raises:
        DiffxError: if there is no such run or checkpoint, or its weights cannot be loaded.
    """
    config = run.config()
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        made = build_denoiser(config)
    ema: EMA = make(config, "ema")(made)
    # a checkpoint holds the averages itself; beside it there are no exported weights that would be preferred
    folder, checkpoint = run.weights.parent, run.newest_checkpoint()[0]
    if step is not None:
        folder, checkpoint = run.checkpoints, _checkpoint(run, step)
    denoiser, _ = load_weights(ema, weights, folder, checkpoint)
    return denoiser.requires_grad_(False).eval()


def _checkpoint(run: Run, step: int) -> Path:
    file = run.checkpoints / f"step={step:08d}.ckpt"
    if not file.is_file():
        steps = ", ".join(str(step_of(other)) for other in sorted(run.checkpoints.glob("step=*.ckpt")))
        raise DiffxError(
            f"'{run.path}' has no checkpoint of step {step}{f', only of {steps}' if steps else ''}; choose another "
            "guidance.step, or keep more when training: checkpoint.every_n_steps and checkpoint.keep_last"
        )
    return file
