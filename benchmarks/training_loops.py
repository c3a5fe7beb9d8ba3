"""The same training by hand, by Lightning alone, and as `diffx train` runs it."""

import copy
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import devnull
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import Clock
from rich.console import Console
from torch import Tensor, nn

from diffx import parameterizations
from diffx.autoencoders import Pixels
from diffx.conditioning import LabelConditioner
from diffx.data import Batch, DataSource
from diffx.denoisers import Preconditioned
from diffx.objectives import Denoising
from diffx.schedules import EDM
from diffx.time_samplers import LogNormal
from diffx.training import DiffusionModule
from diffx.training.callbacks import ProgressBar
from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.ema import EMA
from diffx.training.fit import fit
from diffx.training.log import TrainingLog
from diffx.training.loggers import CSVLogger
from diffx.training.lr_schedules import Constant
from diffx.training.nonfinite import NonFinite
from diffx.utils import Keys
from diffx.utils.signals import StopSignal
from diffx.weightings import Unit

P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5
P_DROP, CLIP, DECAY, LR = 0.1, 1.0, 0.998, 2e-4
optimizer = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Setting:
    """What all contenders train.

    Arguments:
        network: copied by each contender.
        source: the data; its batch is the batch.
        warm_up: steps before the clock starts.
        steps: steps that are timed.
        clock: what they are timed with.
    """

    network: nn.Module
    source: DataSource
    warm_up: int
    steps: int
    clock: Clock

    def timed(self, batches: Iterable[Any]) -> "Timed":
        """The batches, with the clock."""
        return Timed(batches, self.warm_up, self.steps, self.clock)


class Timed:
    """Hands batches on, and notes when the first after the warm-up and the last are asked for.

    Arguments:
        batches: the batches.
        warm_up: steps before the clock starts.
        steps: steps that are timed.
        clock: what they are timed with.
        marks: what else is called, by the number of the batch that is asked for.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        warm_up: int,
        steps: int,
        clock: Clock,
        marks: Mapping[int, Callable[[], object]] | None = None,
    ) -> None:
        self.batches = batches
        self.warm_up = warm_up
        self.steps = steps
        self.clock = clock
        self.marks = marks or {}
        self.stamps: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for n, batch in enumerate(self.batches):
            if n in (self.warm_up, self.warm_up + self.steps):
                self.stamps.append(self.clock())
            if n in self.marks:
                self.marks[n]()
            yield batch

    @property
    def microseconds(self) -> float:
        """Per step."""
        started, ended = self.stamps
        return (ended - started) / self.steps * 1e6

    @property
    def total(self) -> int:
        """Steps to train."""
        return max(self.warm_up + self.steps, *self.marks, 0) + 2


def epoch(source: DataSource) -> list[Batch]:
    """An epoch in ready batches."""
    images = source.split("train")
    everything = images.get(torch.arange(len(images)))
    whole = len(images) // source.batch_size
    xs, labels = (everything[name].split(source.batch_size)[:whole] for name in ("x", "label"))
    return [{"x": x, "label": label} for x, label in zip(xs, labels, strict=True)]


# ---- by hand ----


def bare_loss(network: nn.Module, x: Tensor, label: Tensor, normal: Tensor, z: Tensor) -> Tensor:
    """EDM's loss per sample (arXiv 2206.00364), written for this one case."""
    log_sigma = P_MEAN + P_STD * normal
    sigma = log_sigma.exp()[:, None, None, None]
    c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
    c_skip = (SIGMA_DATA * c_in) ** 2
    c_out = sigma * SIGMA_DATA * c_in
    x_t = x + sigma * z
    output = network(c_in * x_t, -2 * log_sigma, label=label)
    return (output - (x - c_skip * x_t) / c_out).square().mean(dim=(1, 2, 3))


def bare_step_loss(network: nn.Module, batch: Batch, classes: int) -> Tensor:
    """The mean loss of a batch, with torch's own random numbers."""
    x = batch["x"].float() / 127.5 - 1
    label = batch["label"].masked_fill(torch.rand(len(x)) < P_DROP, classes)
    return bare_loss(network, x, label, torch.randn(len(x)), torch.randn_like(x)).mean()


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, n: int) -> None:
    """The EMA's update n."""
    decay = min(DECAY, (1 + n) / (10 + n))
    averages: list[Tensor] = [*average.parameters()]
    weights: list[Tensor] = [*network.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def run_bare(setting: Setting) -> float:
    """The loop that one would write by hand."""
    network = copy.deepcopy(setting.network)
    average = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    step = optimizer(parameters)
    batches = setting.timed(itertools.cycle(epoch(setting.source)))
    for n, batch in enumerate(itertools.islice(batches, batches.total), start=1):
        bare_step_loss(network, batch, setting.source.num_classes).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        step.step()
        step.zero_grad()
        update(average, network, n)
    return batches.microseconds


# ---- Lightning ----


class Plain(L.LightningModule):
    """The bare step as a LightningModule."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.classes = classes

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return bare_step_loss(self.network, batch, self.classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.network.parameters())

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        update(self.average, self.network, self.trainer.global_step)


def run_lightning(setting: Setting) -> float:
    """Lightning without callbacks or loggers."""
    batches = setting.timed(itertools.cycle(epoch(setting.source)))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=batches.total, max_epochs=-1, gradient_clip_val=CLIP, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Plain(copy.deepcopy(setting.network), setting.source.num_classes), batches)
    return batches.microseconds


# ---- diffx ----


class TimedData(L.LightningDataModule):
    """The stream of `diffx train`, with a clock."""

    def __init__(self, stream: StreamData, batches: Timed) -> None:
        super().__init__()
        self.stream = stream
        self.batches = batches

    def train_dataloader(self) -> Timed:
        self.stream.trainer = self.trainer
        self.batches.batches = self.stream.train_dataloader()
        return self.batches


def diffx_module(network: nn.Module, source: DataSource) -> DiffusionModule:
    """What `diffx train experiment=digits_edm` trains."""
    denoiser = Preconditioned(network, EDM(), parameterizations.EDM(SIGMA_DATA))
    return DiffusionModule(
        denoiser, Denoising(LogNormal(P_MEAN, P_STD), Unit()), Pixels(), LabelConditioner(source.num_classes, P_DROP),
        EMA(denoiser, DECAY), optimizer, Constant(), seed=0, batch_size=source.batch_size,
    )  # fmt: skip


def fit_diffx(
    module: DiffusionModule,
    source: DataSource,
    batches: Timed,
    accelerator: str = "cpu",
    precision: str = "32-true",
    checkpoint_every: int = 10**9,
) -> None:
    """The whole path: keyed noise, data stream, EMA, loss by noise level, CSV log, progress bar, signals.

    Arguments:
        module: what is trained.
        source: the data.
        batches: takes the times; its batches are replaced by the stream.
        accelerator: as `trainer.accelerator`.
        precision: as `trainer.precision`.
        checkpoint_every: steps between checkpoints, in a folder that is removed.
    """
    log = TrainingLog(every_n_steps=50)
    with tempfile.TemporaryDirectory() as folder, Path(devnull).open("w") as nowhere:
        never = NonFinite("stop", 50, 10**9, Path(folder) / "nonfinite.jsonl")
        fit(
            module,
            TimedData(StreamData(source, seed=0, accumulate=1), batches),
            checkpoints=Checkpoints(Path(folder), checkpoint_every, 1, None, "benchmark", StopSignal()),
            callbacks=[log, ProgressBar(log, Console(force_terminal=True, file=nowhere)), never],
            loggers=[CSVLogger(Path(folder) / "metrics.csv")],
            resume=None,
            max_steps=batches.total,
            precision=precision,
            gradient_clip_val=CLIP,
            accelerator=accelerator,
            devices=1,
            num_nodes=1,
            strategy="auto",
            accumulate_grad_batches=1,
        )


def run_diffx(setting: Setting) -> float:
    """As `diffx train trainer=cpu`."""
    batches = setting.timed([])
    fit_diffx(diffx_module(copy.deepcopy(setting.network), setting.source), setting.source, batches)
    return batches.microseconds


@torch.no_grad()
def check_same_loss(network: nn.Module, source: DataSource) -> None:
    """diffx and the bare loop compute the same loss when both are given the same random numbers."""
    network = copy.deepcopy(network).eval()
    for parameter in network.parameters():  # a network that starts as zero would agree with anything
        parameter.add_(0.01 * torch.randn_like(parameter))
    batch = next(iter(source.train_loader(seed=0)))
    losses = diffx_module(network, source).training_step(batch, 0)["losses"]
    keys = Keys(0, batch["index"])
    x = batch["x"].float() / 127.5 - 1
    label = batch["label"].masked_fill(keys.uniform("label_drop") < P_DROP, source.num_classes)
    bare = bare_loss(network, x, label, keys.normal("time"), keys.normal("noise", *x.shape[1:]))
    torch.testing.assert_close(losses, bare, rtol=1e-4, atol=1e-5)
