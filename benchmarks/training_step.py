"""A training step: diffx as `diffx train` runs it, Lightning alone, and a bare PyTorch loop, with the same loss."""

import copy
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from os import devnull
from pathlib import Path

import lightning as L
import torch
from measure import Case, Clock
from rich.console import Console
from torch import Tensor, nn

from diffx import parameterizations
from diffx.autoencoders import Pixels
from diffx.backbones import UNet
from diffx.conditioning import LabelConditioner
from diffx.data import Batch, DataSource, Digits
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

BATCH, CLASSES = 64, 10
P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5
P_DROP, CLIP, DECAY = 0.1, 1.0, 0.998
WARM_UP = 10
optimizer = partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.0, fused=True)


class Null(nn.Module):
    """Next to no network: 2 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        return self.layer(x)


def unet_digits() -> UNet:
    """configs/backbone/unet_digits.yaml."""
    return UNet(
        in_channels=1, image_size=8, num_classes=CLASSES, base=32, mult=[1, 2], blocks=1, attention=[], heads=2,
        scale_shift=True, resblock_updown=False, groups=8,
    )  # fmt: skip


def cases(quick: bool, clock: Clock) -> list[Case]:
    """The null network shows the overhead itself, the other what it amounts to."""
    return [
        _case("null network", Null(), steps=50 if quick else 200, rounds=2 if quick else 9, clock=clock),
        _case("unet_digits", unet_digits(), steps=5 if quick else 30, rounds=2 if quick else 5, clock=clock),
    ]


def _case(name: str, network: nn.Module, steps: int, rounds: int, clock: Clock) -> Case:
    source = Digits(
        name="digits", channels=1, image_size=8, num_classes=CLASSES, batch_size=BATCH, flip=False, num_workers=0
    )
    check_same_loss(network, source)
    return Case(
        "training, µs per step",
        name,
        {
            "bare loop": lambda: run_bare(copy.deepcopy(network), source, steps, clock),
            "Lightning alone": lambda: run_lightning(copy.deepcopy(network), source, steps, clock),
            "diffx": lambda: run_diffx(copy.deepcopy(network), source, steps, clock),
        },
        rounds,
    )


class Timed:
    """Hands batches on, and notes when the first after the warm-up and the last are asked for."""

    def __init__(self, batches: Iterable[Batch], steps: int, clock: Clock) -> None:
        self.batches = batches
        self.steps = steps
        self.clock = clock
        self.stamps: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for n, batch in enumerate(self.batches):
            if n in (WARM_UP, WARM_UP + self.steps):
                self.stamps.append(self.clock())
            yield batch

    @property
    def microseconds(self) -> float:
        """Per step."""
        started, ended = self.stamps
        return (ended - started) / self.steps * 1e6

    @property
    def total(self) -> int:
        """Steps to train."""
        return WARM_UP + self.steps + 2


def in_memory(source: DataSource) -> Iterator[Batch]:
    """An epoch in ready batches, over and over."""
    everything = source.split("train").get(torch.arange(len(source.split("train"))))
    xs, labels = (everything[name].split(BATCH)[:-1] for name in ("x", "label"))
    return itertools.cycle([{"x": x, "label": label} for x, label in zip(xs, labels, strict=True)])


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


def bare_step_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch, with torch's own random numbers."""
    x = batch["x"].float() / 127.5 - 1
    label = batch["label"].masked_fill(torch.rand(len(x)) < P_DROP, CLASSES)
    return bare_loss(network, x, label, torch.randn(len(x)), torch.randn_like(x)).mean()


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, n: int) -> None:
    """The EMA's update n."""
    decay = min(DECAY, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def run_bare(network: nn.Module, source: DataSource, steps: int, clock: Clock) -> float:
    """The loop that one would write by hand."""
    average = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    step = optimizer(parameters)
    batches = Timed(in_memory(source), steps, clock)
    for n, batch in enumerate(itertools.islice(batches, batches.total), start=1):
        bare_step_loss(network, batch).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        step.step()
        step.zero_grad()
        update(average, network, n)
    return batches.microseconds


class Plain(L.LightningModule):
    """The bare step as a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return bare_step_loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.network.parameters())

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        update(self.average, self.network, self.trainer.global_step)


def run_lightning(network: nn.Module, source: DataSource, steps: int, clock: Clock) -> float:
    """Lightning without callbacks or loggers."""
    batches = Timed(in_memory(source), steps, clock)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=batches.total, max_epochs=-1, gradient_clip_val=CLIP, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Plain(network), batches)
    return batches.microseconds


class TimedData(L.LightningDataModule):
    """The stream of `diffx train`, with a clock."""

    def __init__(self, stream: StreamData, steps: int, clock: Clock) -> None:
        super().__init__()
        self.stream = stream
        self.batches = Timed([], steps, clock)

    def train_dataloader(self) -> Timed:
        self.stream.trainer = self.trainer
        self.batches.batches = self.stream.train_dataloader()
        return self.batches


def diffx_module(network: nn.Module) -> DiffusionModule:
    """What `diffx train experiment=digits` trains."""
    denoiser = Preconditioned(network, EDM(), parameterizations.EDM(SIGMA_DATA))
    return DiffusionModule(
        denoiser, Denoising(LogNormal(P_MEAN, P_STD), Unit()), Pixels(), LabelConditioner(CLASSES, P_DROP),
        EMA(denoiser, DECAY), optimizer, Constant(), seed=0, batch_size=BATCH,
    )  # fmt: skip


def run_diffx(network: nn.Module, source: DataSource, steps: int, clock: Clock) -> float:
    """The whole path: keyed noise, data stream, EMA, loss by noise level, CSV log, progress bar, signals."""
    data = TimedData(StreamData(source, seed=0, accumulate=1), steps, clock)
    log = TrainingLog(every_n_steps=50)
    with tempfile.TemporaryDirectory() as folder, Path(devnull).open("w") as nowhere:
        never = NonFinite("stop", (50,), Path(folder) / "nonfinite.jsonl")
        fit(
            diffx_module(network),
            data,
            checkpoints=Checkpoints(Path(folder), 10**9, 1, None, "benchmark", StopSignal()),
            callbacks=[log, ProgressBar(log, Console(force_terminal=True, file=nowhere)), never],
            loggers=[CSVLogger(Path(folder) / "metrics.csv")],
            resume=None,
            max_steps=data.batches.total,
            precision="32-true",
            gradient_clip_val=CLIP,
            accelerator="cpu",
            devices=1,
            num_nodes=1,
            strategy="auto",
            accumulate_grad_batches=1,
        )
    return data.batches.microseconds


@torch.no_grad()
def check_same_loss(network: nn.Module, source: DataSource) -> None:
    """Both compute the same loss when both are given the same random numbers."""
    batch = next(iter(source.train_loader(seed=0)))
    losses = diffx_module(network).training_step(batch, 0)["losses"]
    keys = Keys(0, batch["index"])
    x = batch["x"].float() / 127.5 - 1
    label = batch["label"].masked_fill(keys.uniform("label_drop") < P_DROP, CLASSES)
    bare = bare_loss(network, x, label, keys.normal("time"), keys.normal("noise", *x.shape[1:]))
    torch.testing.assert_close(losses, bare, rtol=1e-4, atol=1e-5)
