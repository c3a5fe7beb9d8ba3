"""Training through the whole path of diffx on a device: images per second, utilisation, memory, synchronisations."""

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from configured import Noise, backbone
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_loops import Timed, diffx_module, fit_diffx

from diffx.backbones import speed_up
from diffx.training import DiffusionModule
from diffx.training.flops import training_flops


@dataclass(frozen=True)
class Model:
    """A network of configs/backbone.

    Arguments:
        channels: of its input.
        size: height and width of its input.
        classes: number of classes.
        batch: images per step at which the switches are compared.
        convolutions: whether channels-last is a switch.
        small: what is changed in a quick run.
    """

    channels: int
    size: int
    classes: int
    batch: int
    convolutions: bool
    small: dict[str, Any]

    def shape(self, quick: bool) -> tuple[int, int, int]:
        """Of one input, (C, H, W)."""
        size = self.small["image_size"] if quick else self.size
        return self.channels, size, size

    def network(self, name: str, device: str, quick: bool) -> nn.Module:
        """The network of configs/backbone/<name>.yaml, made on the device: large ones take long on a CPU."""
        changes = {key: value for key, value in self.small.items() if quick and key != "image_size"}
        with torch.device(device):
            return backbone(name, *self.shape(quick)[:2], self.classes, **changes)


_SMALL_DIT = {"width": 32, "depth": 1, "heads": 2, "image_size": 8}
_SMALL_UNET = {"base": 32, "mult": [1, 2], "blocks": 1, "attention": [4], "image_size": 8}
MODELS = {
    "dit_b_2": Model(4, 32, 1000, 128, False, _SMALL_DIT),
    "dit_xl_2": Model(4, 32, 1000, 32, False, _SMALL_DIT),
    "ddpm_cifar10": Model(3, 32, 10, 256, True, _SMALL_UNET),
    "adm_imagenet64": Model(3, 64, 1000, 32, True, _SMALL_UNET | {"head_channels": 32}),
}


@dataclass(frozen=True)
class Switches:
    """What can be turned on.

    Arguments:
        name: how the row is called.
        precision: as `trainer.precision`.
        tf32: whether float32 products may be rounded to TF32.
        compile: as `trainer.compile`.
        channels_last: as `trainer.channels_last`.
        activation_checkpointing: as `trainer.activation_checkpointing`.
    """

    name: str
    precision: str = "32-true"
    tf32: bool = False
    compile: bool = False
    channels_last: bool = False
    activation_checkpointing: str = "none"


def switches(model: Model) -> list[Switches]:
    """One after the other, each added to those before; activation checkpointing to the fastest without it."""
    bf16: dict[str, Any] = {"precision": "bf16-mixed", "tf32": True}
    rows = [Switches("fp32, eager"), Switches("tf32", tf32=True), Switches("bf16", **bf16)]
    if model.convolutions:
        rows.append(Switches("bf16, channels-last", **bf16, channels_last=True))
    rows.append(Switches("bf16, compile", **bf16, compile=True))
    return [
        *rows,
        *([fastest(model)] if model.convolutions else []),
        *(
            Switches(
                f"{fastest(model).name}, {kind} checkpointing", **bf16, compile=True,
                channels_last=model.convolutions, activation_checkpointing=kind,
            )
            for kind in ("selective", "full")
        ),
    ]  # fmt: skip


def fastest(model: Model) -> Switches:
    """All that makes a step faster, and nothing that only saves memory."""
    name = "bf16, compile, channels-last" if model.convolutions else "bf16, compile"
    return Switches(name, "bf16-mixed", tf32=True, compile=True, channels_last=model.convolutions)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether float32 matrix products and convolutions may be rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Device:
    """A GPU; or a CPU, which knows no peak memory and no synchronisations, so that these lines can be tried out.

    Arguments:
        kind: `cuda` or `cpu`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.cuda = kind == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def tidy(self) -> None:
        """Frees what an earlier measurement has left."""
        gc.collect()
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB allocated at most since `forget_peak`."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def watch(self, on: bool) -> None:
        """Every synchronisation of host and device warns from here on, or no longer."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")


@contextlib.contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects the places in the code where, while `Device.watch` is on, the host waits for the device."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield places
    places += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def build(
    name: str, model: Model, switched: Switches, batch: int, device: Device, quick: bool
) -> tuple[DiffusionModule, Noise]:
    """What is trained, with its switches on, and the data."""
    channels, size, _ = model.shape(quick)
    source = Noise(2 * batch, channels=channels, image_size=size, num_classes=model.classes, batch_size=batch)
    module = diffx_module(model.network(name, device.kind, quick), source)
    speed_up(
        module.denoiser.backbone,
        compile=switched.compile,
        channels_last=switched.channels_last,
        activation_checkpointing=switched.activation_checkpointing,
    )
    speed_up(module.ema.denoiser.backbone, compile=switched.compile, channels_last=switched.channels_last)
    return module, source


def flops_per_image(name: str, model: Model, device: Device, quick: bool) -> float:
    """Of a training step, forward and backward, without what activation checkpointing computes again."""
    module, source = build(name, model, Switches("plain"), 2, device, quick)
    batch = next(iter(source.train_loader(seed=0)))
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels compute attention again in the backward pass
        return training_flops(module.to(device.kind), batch)


def train(name: str, model: Model, switched: Switches, batch: int, device: Device, quick: bool) -> dict[str, Any]:
    """One row: images per second, peak memory, synchronisations per step, seconds of the first step.

    Raises:
        torch.OutOfMemoryError: if the batch is too large.
    """
    device.tidy()
    warm_up, steps, watched = (3, 2, 2) if quick else (8, 20, 10)
    found: dict[str, Any] = {}
    started: list[float] = []

    def end_of_timing() -> None:
        found["peak_gib"] = device.peak()
        device.watch(True)

    # a batch is asked for while the one before is trained on, so that the first step is done when the third is
    marks = {
        0: lambda: started.append(device.clock()),
        2: lambda: found.update(first_step_seconds=device.clock() - started[0]),
        warm_up: device.forget_peak,
        warm_up + steps: end_of_timing,
        warm_up + steps + watched: lambda: device.watch(False),
    }
    timed = Timed([], warm_up, steps, device.clock, marks)
    module, source = build(name, model, switched, batch, device, quick)
    try:
        with float32_products(switched.tf32), synchronisations() as places:
            fit_diffx(module, source, timed, "gpu" if device.cuda else "cpu", switched.precision)
    finally:
        device.watch(False)
    return {
        "batch": batch,
        "images_per_second": batch / timed.microseconds * 1e6,
        "ms_per_step": timed.microseconds / 1e3,
        "synchronisations_per_step": len(places) / watched,
        "synchronised_at": sorted(set(places)),
        **found,
    }


def best_batch(name: str, model: Model, device: Device, quick: bool, batch: int) -> dict[str, Any]:
    """The batch with the most images per second, doubled until that no longer helps or the memory is full."""
    best: dict[str, Any] = {}
    while True:
        try:
            row = train(name, model, fastest(model), batch, device, quick)
        except torch.OutOfMemoryError:
            if best:
                return best
            if batch == 1:
                raise
            batch //= 2  # the first one already; the smaller is then the largest that fits
            continue
        if best and row["images_per_second"] < 1.02 * best["images_per_second"]:
            return max(best, row, key=lambda found: found["images_per_second"])
        best, batch = row, 2 * batch
        if quick:
            return best


def stall(name: str, model: Model, device: Device, quick: bool) -> dict[str, Any]:
    """What a checkpoint does to training: the longest pause, and all that is above the median of the steps."""
    device.tidy()
    warm_up, every, checkpoints = (3, 4, 2) if quick else (8, 60, 2)
    last = (checkpoints + 1) * every - 1
    stamps: list[float] = []
    marks = {n: lambda: stamps.append(device.clock()) for n in range(warm_up, last)}
    timed = Timed([], warm_up, last - warm_up, device.clock, marks)
    module, source = build(name, model, fastest(model), 2 if quick else model.batch, device, quick)
    fit_diffx(module, source, timed, "gpu" if device.cuda else "cpu", fastest(model).precision, every)
    gaps = torch.tensor(stamps, dtype=torch.float64).diff()
    above = gaps - gaps.median()
    return {
        "ms_per_step": gaps.median().item() * 1e3,
        "longest_pause_ms": above.topk(checkpoints).values.mean().item() * 1e3,
        "added_ms": above.sum().item() / checkpoints * 1e3,
    }
