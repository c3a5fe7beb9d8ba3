"""Training and evaluating a built arm in its run directory: the same for one process and for every rank."""

import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffx.cli.build import Arm, final_points, points
from diffx.cli.evaluate import summary
from diffx.cli.figures import progress_pictures
from diffx.cli.measure import Stopped, best_device, evaluate, table
from diffx.cli.switches import switch_on
from diffx.cli.tracking import log_evaluation, log_weights, loggers_of
from diffx.cli.trained import Task
from diffx.evaluation import Evaluation
from diffx.experiment import Run, fingerprint, identity
from diffx.experiment.run import step_of
from diffx.pictures import save_grid
from diffx.training.callbacks import EvaluateEMA, ProgressBar, Report
from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.fit import Outcome, fit
from diffx.training.log import TrainingLog
from diffx.training.loggers import log_image, trackers
from diffx.training.nonfinite import NonFinite
from diffx.training.weights import BestWeights, export_weights, load_weights
from diffx.utils import DiffxError
from diffx.utils.signals import StopSignal


def execute(arm: Arm, run: Run, console: Console, checkpoint: Path | None, report: Report | None = None) -> int:
    """Trains to the end, exports the weights and evaluates; returns the exit code.

    Arguments:
        arm: what is trained, built.
        run: its directory.
        console: where to print.
        checkpoint: where to go on, the same on every rank; None to start anew.
        report: as `EvaluateEMA`'s; a run that it stops is left as it is, in the state `pruned`.
    """
    asked, code = StopSignal(), 1
    loggers: list[Any] = []
    try:
        loggers = loggers_of(arm, run, step_of(checkpoint) if checkpoint else 0)
        code = _execute(arm, run, console, checkpoint, loggers, asked, report)
        return code
    except DiffxError as error:
        run.set_status("failed", reason=str(error))
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        run.set_status("interrupted", signal=int(signal.SIGINT))
        raise
    except Exception as error:
        run.set_status("failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    finally:
        for tracked in trackers(loggers):
            tracked.finish(code)


def _execute(
    arm: Arm,
    run: Run,
    console: Console,
    checkpoint: Path | None,
    loggers: list[Any],
    asked: StopSignal,
    report: Report | None,
) -> int:
    module = arm.module
    if checkpoint is not None:
        console.print(f"resuming at step {step_of(checkpoint)}", highlight=False)
    run.set_status("running", step=step_of(checkpoint) if checkpoint else 0)
    outcome = _fit(arm, run, console, checkpoint, loggers, asked, report)
    first = outcome.trainer.is_global_zero
    if outcome.signal is not None:
        if first:
            run.set_status("interrupted", step=outcome.step, signal=outcome.signal)
        name = signal.Signals(outcome.signal).name
        console.print(f"{name}: saved at step {outcome.step}; run the same command again to resume", highlight=False)
        return 128 + outcome.signal
    callbacks: list[Any] = outcome.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if any(isinstance(callback, EvaluateEMA) and callback.pruned for callback in callbacks):
        run.set_status("pruned", step=outcome.step)
        console.print(f"pruned at step {outcome.step}: others were better by then", highlight=False)
        return 0
    if first:
        for name, denoiser in module.ema.named().items():
            export_weights(denoiser, run.weights.with_name(f"{name}.safetensors"), outcome.step)
        log_weights(loggers, run, outcome.step)
        run.set_status("evaluating", step=outcome.step)
    trainer = outcome.trainer
    trainer.strategy.barrier()  # the other ranks read what the first has written
    code = summarize(arm, run, console, loggers, module.device, trainer.global_rank, trainer.world_size, asked)
    if first:
        stopped = {"signal": code - 128} if code else {}
        run.set_status("interrupted" if stopped else "finished", step=outcome.step, **stopped)
    return code


def summarize(
    arm: Arm,
    run: Run,
    console: Console,
    loggers: list[Any] | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    asked: StopSignal | None = None,
) -> int:
    """Evaluates a finished run under the config's protocol, unless that is done, and prints the table."""
    config = arm.config
    denoiser, step = load_weights(arm.module.ema, config["weights"], run.weights.parent, run.newest_checkpoint()[0])
    target = torch.device(device or best_device(config["trainer"]["accelerator"]))
    picture, loggers = run.samples / "final.png", loggers or []
    if rank == 0 and not picture.is_file():
        save_grid(arm.generator(denoiser.to(target)), picture, config["evaluation"]["per_class"], target)
        log_image(loggers, "samples", picture, step)
        for key, file in progress_pictures(run).items():
            log_image(loggers, key, file, step)
    if config["evaluation"]["num_samples"]:
        try:
            evaluation, file = evaluate(arm, run, denoiser, step, console, target, rank, world_size, asked=asked)
        except Stopped as stopped:
            console.print(str(stopped), highlight=False)
            return 128 + stopped.signal
        if rank == 0:
            log_evaluation(loggers, "final", evaluation, step)
            console.print(table(evaluation))
            console.print(f"evaluation  {file}", highlight=False, soft_wrap=True)
        try:
            _evaluate_points(arm, run, console, loggers, target, rank, world_size, asked)
        except Stopped as stopped:
            console.print(str(stopped), highlight=False)
            return 128 + stopped.signal
    console.print(
        f"samples     {picture}\nweights     {run.weights}\nmetrics     {run.path / 'metrics.csv'}\n\n"
        "what to type next:\n"
        f"  diffx sample run={run.path} sampler=ddim sampler.steps=50\n"
        f"  diffx evaluate -m run={run.path} sampler=ddim,dpmpp_2m sampler.steps=5,10,20\n"
        "  diffx train -m schedule=linear,cosine parameterization=eps,v seed=0,1\n"
        f"  diffx compare {run.path.parents[1]}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _evaluate_points(
    arm: Arm,
    run: Run,
    console: Console,
    loggers: list[Any],
    device: torch.device,
    rank: int,
    world_size: int,
    stop: StopSignal | None,
) -> None:
    """Measures the model in each of the further ways of `evaluation.final`, where that is not done, and compares them.

    Raises:
        Stopped: if a signal asks to stop.
    """
    done: list[tuple[Task, Evaluation]] = []
    for name, point in final_points(arm, {}).items():
        weights = point.config["weights"]
        denoiser, step = load_weights(arm.module.ema, weights, run.weights.parent, run.newest_checkpoint()[0])
        measured, _ = evaluate(point, run, denoiser, step, console, device, rank, world_size, asked=stop)
        done.append((Task(run, name.split(), point.config), measured))
        if rank == 0:
            log_evaluation(loggers, f"final/{name}", measured, step)
    if done and rank == 0:
        console.print(summary(done))


def _fit(
    arm: Arm,
    run: Run,
    console: Console,
    checkpoint: Path | None,
    loggers: list[Any],
    asked: StopSignal,
    report: Report | None,
) -> Outcome:
    config, module = arm.config, arm.module
    settings, trainer = config["evaluation"], config["trainer"]
    log = TrainingLog(config["log_every_n_steps"], config["training"]["max_device_seconds"])
    callbacks: list[Any] = [log]
    if config["progress_bar"]:
        callbacks.append(ProgressBar(log, console))
    checkpoint_settings = config["checkpoint"]
    looks = (config["log_every_n_steps"], checkpoint_settings["every_n_steps"])
    callbacks.append(NonFinite(config["training"]["nonfinite"], *looks, run.path / "nonfinite.jsonl"))
    monitor, mode = checkpoint_settings["monitor"], checkpoint_settings["mode"]
    callbacks.append(
        EvaluateEMA(
            settings["every_n_steps"],
            points(arm),
            arm.evaluator,
            settings["interim_samples"],
            run.samples,
            settings["per_class"],
            console,
            BestWeights(run.weights.with_name("best.safetensors"), monitor, mode) if monitor else None,
            asked,
            report,
        )
    )
    switch_on(module, trainer, best_device(trainer["accelerator"]))
    return fit(
        module,
        StreamData(arm.source, config["seed"], trainer["accumulate_grad_batches"]),
        checkpoints=Checkpoints(
            run.checkpoints,
            checkpoint_settings["every_n_steps"],
            checkpoint_settings["keep_last"],
            checkpoint_settings["keep_every_n_steps"],
            f"{fingerprint(identity(config))}/seed{config['seed']}",
            asked,
        ),
        callbacks=callbacks,
        loggers=loggers,
        resume=checkpoint,
        **{key: config["training"][key] for key in ("max_steps", "precision", "gradient_clip_val")},
        **{key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")},
    )
