"""Training and evaluating a built arm in its run directory: the same for one process and for every rank."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffx.cli.build import Arm, make
from diffx.denoisers import Denoiser
from diffx.evaluation import Evaluation
from diffx.experiment import Run, fingerprint, identity
from diffx.experiment.run import step_of
from diffx.metrics import Value
from diffx.pictures import save_grid
from diffx.training.callbacks import EvaluateEMA, ProgressBar
from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.fit import Outcome, export_weights, fit, load_weights
from diffx.training.log import TrainingLog
from diffx.training.loggers import CSVLogger, log_image
from diffx.utils import DiffxError


def execute(arm: Arm, run: Run, console: Console) -> int:
    """Trains from the newest checkpoint to the end, exports the weights and evaluates; returns the exit code."""
    config, module = arm.config, arm.module
    checkpoint, broken = run.newest_checkpoint()
    for file in broken:
        console.print(f"passing over the truncated checkpoint {file}", highlight=False)
    if checkpoint is not None:
        console.print(f"resuming at step {step_of(checkpoint)}", highlight=False)
    run.set_status("running", step=step_of(checkpoint) if checkpoint else 0)
    loggers = _loggers(config, run)
    try:
        outcome = _fit(arm, run, console, checkpoint, loggers)
    except DiffxError as error:
        run.set_status("failed", reason=str(error))
        raise
    first = outcome.trainer.is_global_zero
    if outcome.signal is not None:
        if first:
            run.set_status("interrupted", step=outcome.step, signal=outcome.signal)
        name = signal.Signals(outcome.signal).name
        console.print(f"{name}: saved at step {outcome.step}; run the same command again to resume", highlight=False)
        return 128 + outcome.signal
    if first:
        export_weights(module.ema.denoiser, run.weights, outcome.step)
        run.set_status("finished", step=outcome.step)
    trainer = outcome.trainer
    return summarize(arm, run, console, loggers, module.device, trainer.global_rank, trainer.world_size)


def summarize(
    arm: Arm,
    run: Run,
    console: Console,
    loggers: list[Any] | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Evaluates a finished run under the config's protocol, unless that is done, and prints the table."""
    denoiser = arm.module.ema.denoiser
    if loggers is None:
        load_weights(denoiser, run.weights, run.newest_checkpoint()[0])
    target = torch.device(device or best_device(arm.config["trainer"]["accelerator"]))
    picture = run.samples / "final.png"
    if rank == 0 and not picture.is_file():
        save_grid(arm.generator(denoiser.to(target)), picture, arm.config["evaluation"]["per_class"], target)
        log_image(loggers or [], "samples", picture, run.status().get("step", 0))
    if arm.config["evaluation"]["num_samples"]:
        evaluation, file = evaluate(arm, run, denoiser, console, target, rank, world_size)
        if rank == 0:
            for logger in loggers or []:
                row = {f"final/{name}": value.value for name, value in evaluation.values.items()}
                logger.log_metrics(row, step=run.status().get("step", 0))
            console.print(table(evaluation))
            console.print(f"evaluation  {file}", highlight=False, soft_wrap=True)
    console.print(
        f"samples     {picture}\nweights     {run.weights}\nmetrics     {run.path / 'metrics.csv'}\n\n"
        "what to type next:\n"
        f"  diffx sample run={run.path} sampler=ddim sampler.steps=50\n"
        f"  diffx evaluate -m run={run.path} sampler=ddim,dpmpp_2m sampler.steps=5,10,20\n"
        "  diffx train -m schedule=linear,cosine parameterization=eps,v seed=0,1",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def evaluate(
    arm: Arm,
    run: Run,
    denoiser: Denoiser,
    console: Console,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Evaluation, Path]:
    """Measures a denoiser under the config's protocol, or reads what has been measured under it.

    Returns:
        The evaluation and its file.
    """
    config = arm.config
    arm.evaluator.check()
    generator = arm.generator(denoiser.to(device).eval())
    total = config["evaluation"]["num_samples"]
    status = run.status()
    protocol = {
        **arm.evaluator.protocol(),
        "num_samples": total,
        "sampler": config["sampler"],
        "discretization": config["discretization"],
        "nfe": generator.nfe,
        "guidance": config["guidance"],
        "thresholding": config["thresholding"],
        "schedule": config["schedule"],
        "sampling_precision": "32-true",
        "ema": config["ema"],
        "sample_seed": config["evaluation"]["seed"],
    }
    # extractor choice aside, nothing here depends on which run was measured: equal protocols are comparable
    digest = fingerprint(protocol)
    protocol |= {"step": status.get("step"), "seed": config["seed"], "identity": fingerprint(identity(run.config()))}
    file = run.evaluations / f"step={status.get('step', 0):08d}-{digest}.json"
    if file.is_file():
        return Evaluation.load(file), file
    started = time.perf_counter()
    share = len(range(rank, total, world_size))
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"evaluate ({total} samples, NFE {generator.nfe})", total=share)
        values = arm.evaluator(
            generator, total, device, rank, world_size, lambda done: bar.update(task, completed=done)
        )
    values |= arm.evaluator.baselines(rank, world_size)
    evaluation = Evaluation(values, protocol, digest, time.perf_counter() - started)
    if rank == 0:
        evaluation.save(file)
    return evaluation, file


def table(evaluation: Evaluation) -> Table:
    """The values with their uncertainty and protocol, for the terminal."""
    protocol, reference = evaluation.protocol, evaluation.protocol["reference"]
    shown = Table(
        title=f"{protocol['num_samples']} samples of the EMA at step {protocol['step']}, NFE {protocol['nfe']}; "
        f"reference: {reference['images']} {reference['split']} images of {reference['data']}",
        caption=f"protocol {evaluation.fingerprint}",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("metric", no_wrap=True)
    for column in ("value", "±1 s.e.", "n"):
        shown.add_column(column, justify="right")
    shown.add_column("protocol", overflow="fold")
    for value in evaluation.values.values():
        shown.add_row(value.name, f"{value.value:.4g}", _error(value), str(value.n), value.note or value.method)
    return shown


def best_device(accelerator: str) -> str:
    """The device that an accelerator setting means on this machine."""
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return "cuda"
    return "cpu"


def _error(value: Value) -> str:
    return "" if value.stderr is None else f"{value.stderr:.2g}"


def _fit(arm: Arm, run: Run, console: Console, checkpoint: Path | None, loggers: list[Any]) -> Outcome:
    config, module = arm.config, arm.module
    settings, trainer = config["evaluation"], config["trainer"]
    log = TrainingLog(config["log_every_n_steps"])
    callbacks: list[Any] = [log]
    if config["progress_bar"]:
        callbacks.append(ProgressBar(log, console))
    callbacks.append(
        EvaluateEMA(
            settings["every_n_steps"],
            arm.generator,
            arm.evaluator,
            settings["interim_samples"],
            run.samples,
            settings["per_class"],
            console,
        )
    )
    if trainer["compile"]:
        module.denoiser.backbone.compile()
    return fit(
        module,
        StreamData(arm.source, config["seed"], trainer["accumulate_grad_batches"]),
        checkpoints=Checkpoints(
            run.checkpoints,
            config["checkpoint"]["every_n_steps"],
            config["checkpoint"]["keep_last"],
            f"{fingerprint(identity(config))}/seed{config['seed']}",
        ),
        callbacks=callbacks,
        loggers=loggers,
        resume=checkpoint,
        **{key: config["training"][key] for key in ("max_steps", "precision", "gradient_clip_val")},
        **{key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")},
    )


def _loggers(config: dict[str, Any], run: Run) -> list[Any]:
    loggers: list[Any] = [CSVLogger(run.path / "metrics.csv")]
    digest = fingerprint(identity(config))
    name = "/".join(run.path.parts[-2:])
    for key in config["logger"]:
        make_logger = make(config["logger"], key)
        loggers.append(
            make_logger(
                directory=run.path / key,
                run_id=f"{digest}-seed{config['seed']}",
                group=digest,
                name=name,
                config=config,
            )
        )
    return loggers
