"""Measuring a trained model under the protocol of a config, once."""

import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from diffx.cli.build import Arm, make
from diffx.cli.figures import nearest_picture
from diffx.denoisers import Denoiser
from diffx.evaluation import Evaluation, Interrupted, bits_per_dim
from diffx.experiment import Record, Run, fingerprint, identity
from diffx.experiment.identity import INFERENCE
from diffx.experiment.record import command_line, processor
from diffx.generate import Generator
from diffx.metrics import Value
from diffx.samplers import Counted
from diffx.utils.signals import StopSignal


class Stopped(Exception):  # noqa: N818 (nothing has gone wrong)
    """An evaluation that a signal has stopped.

    Arguments:
        signal: its number.
        done: the number of samples measured so far.
    """

    def __init__(self, signal: int, done: int) -> None:
        super().__init__(f"stopped after {done} samples, which are kept; run the same command again to go on")
        self.signal = signal


def protocol_of(arm: Arm, generator: Generator, step: int, run: Run) -> tuple[dict[str, Any], str]:
    """What the values will depend on, and its hash.

    The hash leaves out which run was measured: equal protocols are comparable.
    """
    config = arm.config
    protocol = {
        **arm.evaluator.protocol(),
        "metrics": config["metrics"],
        "num_samples": config["evaluation"]["num_samples"],
        "sampler": config["sampler"],
        "discretization": config["discretization"],
        "nfe": generator.nfe,
        "guidance": config["guidance"],
        "thresholding": config["thresholding"],
        "schedule": config["schedule"],
        "sampling_precision": generator.precision,
        "weights": config["weights"],
        "ema": config["ema"],
        "sample_seed": config["evaluation"]["seed"],
        # of files that the settings name by their paths only: a learned grid, another run, a classifier
        "times": fingerprint([f"{t:.9g}" for t in generator.times().tolist()]),
        "guide": guide_hash(arm, generator.denoiser),
    }
    if arm.module.autoencoder.state_dict():  # what decodes the samples
        protocol["autoencoder"] = arm.module.autoencoder.fingerprint()
    if config["likelihood"]:
        protocol |= {"likelihood": config["likelihood"], "likelihood_images": config["evaluation"]["likelihood_images"]}
    digest = fingerprint(protocol)
    about = {"step": step, "seed": config["seed"], "identity": fingerprint(identity(run.config()))}
    return protocol | about, digest


def guide_hash(arm: Arm, denoiser: Denoiser) -> str:
    """The hash of all weights in a guided denoiser that are not the model's own; empty if there are none."""
    own = {tensor.data_ptr() for average in arm.module.ema.named().values() for tensor in average.state_dict().values()}
    guide = {name: tensor for name, tensor in denoiser.state_dict().items() if tensor.data_ptr() not in own}
    digest = hashlib.sha256()
    for name, tensor in guide.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if guide else ""


def evaluate(
    arm: Arm,
    run: Run,
    denoiser: Denoiser,
    step: int,
    console: Console,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    known: bool = True,
    asked: StopSignal | None = None,
) -> tuple[Evaluation, Path]:
    """Measures a denoiser under the config's protocol, or reads what has been measured under it.

    Arguments:
        arm: the run, built with the settings to evaluate with.
        run: its directory.
        denoiser: its weights.
        step: the training step that they are of.
        console: where the progress bar goes.
        device: where to sample.
        rank: this process.
        world_size: number of processes; all of them have to call it.
        known: whether to take a measured value from its file.
        asked: what has been asked of the caller already; it is stopped by the same.

    Returns:
        The evaluation and its file.

    Raises:
        Stopped: if a signal asks to stop; the partial sums are kept.
    """
    config = arm.config
    arm.evaluator.check()
    generator = arm.generator(denoiser.to(device).eval())
    counted = Counted(generator.denoiser)
    if generator.nfe is None:
        generator = replace(generator, denoiser=counted)
    total = config["evaluation"]["num_samples"]
    protocol, digest = protocol_of(arm, generator, step, run)
    file = run.evaluations / f"step={step:08d}-{digest}.json"
    if known and file.is_file():
        return Evaluation.load(file), file
    started = time.perf_counter()
    snapshot = file.with_suffix(".partial.safetensors")
    with (
        StopSignal() if asked is None else asked as asked,
        Progress(*_COLUMNS, console=console, disable=not console.is_terminal, transient=True) as bar,
    ):
        task = bar.add_task(f"evaluate ({total} samples, NFE {generator.nfe or 'adaptive'})", total=total)
        try:
            measured = arm.evaluator(
                generator,
                total,
                device,
                rank,
                world_size,
                on_batch=lambda done: bar.update(task, completed=done),
                snapshot=snapshot if known else None,
                stop=lambda: asked.number or 0,
            )
        except Interrupted as interrupted:
            raise Stopped(interrupted.signal, interrupted.done) from None
    values = measured.values | arm.evaluator.baselines(rank, world_size)
    if counted.calls:
        nfe = counted.samples / max(measured.made, 1)  # others' samples take as many on average
        values["nfe"] = Value("nfe", nfe, None, total, "denoiser calls per sample, counted")
    if config["likelihood"]:
        module, wanted = arm.module.to(device), config["evaluation"]["likelihood_images"]
        parts = (make(config, "likelihood"), denoiser, module.autoencoder, module.conditioner.eval())
        size = config["evaluation"]["batch_size"]
        value = bits_per_dim(*parts, arm.source.split("test"), wanted, size, device, rank, world_size)
        values[value.name] = value
    evaluation = Evaluation(
        values,
        protocol,
        digest,
        {**measured.seconds, "total": time.perf_counter() - started},
        measured.omitted,
        {key: config[key] for key in sorted({*INFERENCE, "choices", "schedule"})},
        f"diffx evaluate repeat={file}",
        _environment(device, world_size),
    )
    nearest_picture(measured.metrics, generator, arm.source, file.with_suffix(".nearest.png"), rank)
    if rank == 0 and known:
        evaluation.save(file)
        snapshot.unlink(missing_ok=True)
    return evaluation, file


_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)


def _environment(device: torch.device, world_size: int) -> dict[str, Any]:
    record = Record.now(command_line())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return asdict(record) | {"device": f"{device.type} ({name})", "processes": world_size}


def table(evaluation: Evaluation) -> Table:
    """The values with their uncertainty and protocol, for the terminal; how each was computed stands in the record."""
    protocol, reference = evaluation.protocol, evaluation.protocol["reference"]
    against = reference.get("file") or f"{reference['images']} {reference['split']} images of {reference['data']}"
    if "images" in protocol:
        made = f"{protocol['num_samples']} images of {protocol['images']}"
    else:
        of = f"{protocol['weights']} at step {protocol['step']}"
        made = f"{protocol['num_samples']} samples of {of}, NFE {nfe_of(evaluation):.4g}"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in evaluation.seconds.items() if value >= 0.05)
    notes = [f"{value.name}: {value.note}" for value in evaluation.values.values() if value.note]
    notes += [f"not measured: {name} ({why})" for name, why in evaluation.omitted.items()]
    shown = Table(
        title=f"{made}; reference: {against}",
        caption="\n".join([f"protocol {evaluation.fingerprint}; {seconds}", *notes]),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("metric", no_wrap=True)
    for column in ("value", "± 1 s.e.", "limit for n → ∞, 95 %", "n"):
        shown.add_column(column, justify="right", no_wrap=True)
    for value in evaluation.values.values():
        error = "" if value.stderr is None else f"{value.stderr:.2g}"
        limit = "" if value.interval is None else f"{value.interval[0]:.4g} … {value.interval[1]:.4g}"
        shown.add_row(value.name, f"{value.value:.4g}", error, limit, str(value.n))
    return shown


def nfe_of(evaluation: Evaluation) -> float:
    """Denoiser calls per sample: those that the settings say, or those counted of an adaptive sampler."""
    said = evaluation.protocol["nfe"]
    return evaluation.values["nfe"].value if said is None else said


def best_device(accelerator: str) -> str:
    """The device that an accelerator setting means on this machine."""
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return "cuda"
    return "cpu"


def cell(value: Value) -> str:
    """A value with its standard error, for a cell of a table."""
    return f"{value.value:.4g}" + ("" if value.stderr is None else f" ± {value.stderr:.2g}")
