"""What training, sampling and measuring cost on this machine, found out by a little of each."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffx.generate import Generator
from diffx.metrics.extractors import Extractor, extract
from diffx.samplers import Counted
from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.fit import fit
from diffx.training.loggers import CSVLogger
from diffx.training.module import DiffusionModule
from diffx.utils.signals import StopSignal

_NEVER = 2**62


@dataclass(frozen=True)
class TrainingSpeed:
    """The cost of training in one process.

    Arguments:
        step: seconds of an optimizer step.
        start: seconds before steps are that fast: loading, compiling, the first step.
        checkpoint: seconds to write a checkpoint.
        memory: bytes at most, allocated by torch on a GPU, resident in the process on a CPU.
    """

    step: float
    start: float
    checkpoint: float
    memory: int


@dataclass(frozen=True)
class SamplingSpeed:
    """The cost of sampling in one process.

    Arguments:
        call: seconds of a denoiser call, per sample of the batch.
        decode: seconds to make an image of a latent.
        calls: denoiser calls per sample of the whole grid, for samplers that find their steps themselves.
        memory: bytes at most.
    """

    call: float
    decode: float
    calls: float
    memory: int


def probe_training(
    module: DiffusionModule,
    data: StreamData,
    device: torch.device,
    folder: Path,
    callbacks: Sequence[L.Callback],
    *,
    seconds: float,
    **settings: Any,
) -> TrainingSpeed:
    """Trains for a while as `diffx train` does: loader, objective, clipping, optimizer, EMA, log, a checkpoint.

    The weights of the module change; torch's random state does not.

    Arguments:
        module: what is to be trained.
        data: its data.
        device: what the trainer will train on.
        folder: where log and checkpoint are written; it is left to the caller to delete it.
        callbacks: what looks at every step.
        seconds: how long to time steps, after a warm-up.
        settings: further arguments of `fit`, for one process.

    Raises:
        KeyboardInterrupt: if a signal asks to stop.
        DiffxError: whatever training raises.
    """
    began, clock, memory = time.perf_counter(), _StepClock(seconds), _peak(device)
    with _undisturbed(), _signals() as asked:
        fit(
            module,
            data,
            checkpoints=Checkpoints(folder, _NEVER, 1, None, "probe", asked),
            callbacks=[*callbacks, clock],
            loggers=[CSVLogger(folder / "metrics.csv")],
            resume=None,
            max_steps=-1,
            **settings,
        )
        written = time.perf_counter()
        if asked:
            raise KeyboardInterrupt
    step = median(clock.blocks)
    return TrainingSpeed(step, max(clock.first - began - step, 0.0), written - clock.ended, memory())


@torch.no_grad()
def probe_sampling(generator: Generator, batch_size: int, device: torch.device, *, seconds: float) -> SamplingSpeed:
    """Takes steps of a sampler for a while.

    Arguments:
        generator: what samples.
        batch_size: samples per batch; fewer are taken where a step of one sample shows that it would take too long.
        device: where.
        seconds: after so long the steps that are left are not taken.
    """
    counted = Counted(generator.denoiser)
    generator, memory = replace(generator, denoiser=counted), _peak(device)
    with _undisturbed():
        alone = _seconds(lambda: next(generator.trajectory(torch.arange(1, device=device))), device)
        index = torch.arange(max(1, min(batch_size, int(seconds / alone))), device=device)
        x = next(generator.trajectory(index))  # a warm-up: the first call at a batch size takes longer
        counted.samples, began, spent, steps = 0, _now(device), 0.0, 0
        for x in generator.trajectory(index):  # noqa: B007
            spent, steps = _now(device) - began, steps + 1
            if spent > seconds:
                break
        decode = _seconds(lambda: generator.autoencoder.decode(x), device)
    calls = counted.samples / len(index) * (len(generator.times()) - 1) / steps
    return SamplingSpeed(spent / counted.samples, decode / len(index), calls, memory())


@torch.no_grad()
def probe_extraction(extractor: Extractor, images: Tensor, device: torch.device, *, seconds: float) -> float:
    """Seconds per image to measure it.

    Arguments:
        extractor: the network behind the metrics.
        images: uint8 `[B, C, H, W]`, a batch of an evaluation; fewer are taken where they would take too long.
        device: where.
        seconds: about how long it may take.
    """
    extractor.to(device)
    some = images[:8]
    _seconds(lambda: extract(extractor, some), device)
    each = _seconds(lambda: extract(extractor, some), device) / len(some)
    more = images[: max(1, min(len(images), int(seconds / each)))]
    return min(each, _seconds(lambda: extract(extractor, more), device) / len(more))


class _StepClock(L.Callback):
    """Times optimizer steps in blocks of half a second or more, then stops the trainer.

    Within a block the device is not waited for, as in training.
    """

    def __init__(self, seconds: float, block: float = 0.5, warm_up: int = 10) -> None:
        self.seconds = seconds
        self.block = block
        self.warm_up = warm_up
        self.first = self.ended = 0.0
        self.blocks: list[float] = []
        self._steps = 0
        self._started: tuple[float, int] | None = None
        self._spent = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time, at optimizer steps."""
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        if self._steps == 1:
            self.first = _now(pl_module.device)
        elif self._started is None:
            warm = time.perf_counter() - self.first > self.seconds / 4 or self._steps >= self.warm_up
            self._started = (_now(pl_module.device), self._steps) if warm else None
        elif time.perf_counter() - self._started[0] >= self.block:
            began, steps = self._started
            self._started = now, _ = _now(pl_module.device), self._steps
            self.blocks.append((now - began) / (self._steps - steps))
            self._spent += now - began
            trainer.should_stop = self._spent >= self.seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes when the checkpoint begins to be written."""
        self.ended = _now(pl_module.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(work: Any, device: torch.device) -> float:
    began = _now(device)
    work()
    return _now(device) - began


@contextmanager
def _signals() -> Iterator[StopSignal]:
    """What `fit` takes the signals over with; afterwards they are given back."""
    asked = StopSignal()
    try:
        yield asked
    finally:
        asked.__exit__()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves torch's random states as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _peak(device: torch.device) -> Callable[[], int]:
    """A function that tells the largest use of memory from now on, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak begins anew
    except OSError:
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    return lambda: int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
