"""The training log: loss, loss by noise level, rate, gradient norm, speed."""

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffx.data import StreamLoader
from diffx.training.energy import EnergyMeter
from diffx.training.flops import training_flops
from diffx.training.module import DiffusionModule
from diffx.training.processes import over_ranks
from diffx.utils.transfer import HostCopy, to_device

LOGSNR_EDGES = (-8.0, -4.0, 0.0, 4.0, 8.0)
"""Edges of the noise-level bins: `loss/logsnr<-8`, …, `loss/logsnr>8`."""


@dataclass(frozen=True)
class _Window:
    """A window that has ended.

    Arguments:
        step: the optimizer step at its end.
        new_images: images seen in it, on all ranks.
        images: images seen in training.
        elapsed: its seconds, without evaluations.
        lr: the learning rate.
        terms: the names of the objective's further terms.
        values: the sums of all ranks: losses and counts by noise level, costs, terms; and the gradient's norm.
    """

    step: int
    new_images: int
    images: int
    elapsed: float
    lr: float
    terms: list[str]
    values: HostCopy


class TrainingLog(L.Callback):
    """Means over each window of n steps, written by the loggers at its end.

    Sums stay on the device: a step costs a few small operations and no synchronisation. On a GPU a row is written a
    step after its window has ended, when its numbers have come to the host.

    Beside the loss stand the costs so far, without evaluations: images, floating point operations, device-seconds and,
    where the driver tells, energy.

    Arguments:
        every_n_steps: length of the window.
        max_device_seconds: training stops at the end of the window in which so many device-seconds are spent.
    """

    def __init__(self, every_n_steps: int, max_device_seconds: float | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.max_device_seconds = max_device_seconds
        self.device_seconds = 0.0
        self.joules = 0.0
        self.flops_per_image: float | None = None
        self.sums = torch.zeros(len(LOGSNR_EDGES) + 1, 2)
        self.terms: dict[str, Tensor] = {}
        self.latest: dict[str, float] = {}
        self._edges = torch.tensor(LOGSNR_EDGES)
        self._clock = (0.0, 0)
        self._waited = (0.0, 0)
        self._meter = EnergyMeter()
        self._closed: _Window | None = None

    def leave_out(self, seconds: float) -> None:
        """Tells of time in this window that was not spent on training."""
        self._clock = (self._clock[0] + seconds, self._clock[1])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the open window of all ranks, so that a resumed run logs what the uninterrupted one logs."""
        self._write(trainer)
        checkpoint["training_log"] = over_ranks(self.sums.clone())
        checkpoint["training_log_terms"] = {name: over_ranks(value.clone()) for name, value in self.terms.items()}
        open_window = (time.perf_counter() - self._clock[0]) * trainer.world_size
        checkpoint["training_log_costs"] = {
            "device_seconds": self.device_seconds + open_window,
            "joules": self.joules,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the open window, on one rank: they will be added up again."""
        self.sums = checkpoint["training_log"] * trainer.is_global_zero
        saved = checkpoint["training_log_terms"]
        self.terms = {name: value * trainer.is_global_zero for name, value in saved.items()}
        costs = checkpoint["training_log_costs"]
        self.device_seconds, self.joules = costs["device_seconds"], costs["joules"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves the sums to the device and starts the clock."""
        device = pl_module.device
        self.sums, self._edges = self.sums.to(device), self._edges.to(device)
        self.terms = {name: value.to(device) for name, value in self.terms.items()}
        self._clock = (time.perf_counter(), trainer.global_step)
        self._meter = EnergyMeter(device)
        self._stop_if_spent(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the operations, once."""
        if self.flops_per_image is None:
            assert isinstance(pl_module, DiffusionModule)
            with trainer.precision_plugin.train_step_context():
                self.flops_per_image = training_flops(pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch to the window; at its end writes the means."""
        self._write(trainer)
        losses = outputs["losses"]
        finite = losses.isfinite()  # the others are told of elsewhere
        terms = torch.stack([losses.where(finite, 0), finite.to(losses.dtype)], dim=1).to(self.sums.dtype)
        self.sums.index_add_(0, torch.bucketize(outputs["logsnr"], self._edges), terms)
        for name, value in outputs["terms"].items():
            # a sum of its own: the first one of a window is not the next batch's memory
            self.terms[name] = self.terms.get(name, 0) + value.sum()
        if trainer.global_step % self.every_n_steps == 0 and not trainer.fit_loop._should_accumulate():
            assert isinstance(pl_module, DiffusionModule)
            self._close(trainer, pl_module)
            if pl_module.device.type == "cpu":
                self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last window."""
        self._write(trainer)

    def _close(self, trainer: L.Trainer, module: DiffusionModule) -> None:
        """Ends the window: the sums of all ranks set out for the host, in one piece."""
        now, step = time.perf_counter(), trainer.global_step
        elapsed, steps = now - self._clock[0], step - self._clock[1]
        costs = [elapsed, self._meter.joules(), *self._reading(trainer)]
        parts = [self.sums.flatten(), to_device(costs, self.sums.device), *(v[None] for v in self.terms.values())]
        values = over_ranks(torch.cat(parts))
        if module.grad_norm is not None:  # the same on all ranks
            values = torch.cat([values, module.grad_norm[None]])
        lr, batch = trainer.optimizers[0].param_groups[0]["lr"], module.batch_size
        self._closed = _Window(step, steps * batch, step * batch, elapsed, lr, [*self.terms], HostCopy(values))
        self._clock = (now, step)
        self.sums.zero_()
        self.terms = {}

    def _write(self, trainer: L.Trainer) -> None:
        """Writes the window that has been closed, if there is one."""
        window, self._closed = self._closed, None
        if window is None:
            return
        values = window.values.read()
        sums, values = values[: self.sums.numel()].reshape(self.sums.shape), values[self.sums.numel() :].tolist()
        total, count = sums.sum(0).tolist()
        (elapsed, joules, waited, replaced), values = values[:4], values[4:]
        self.device_seconds += elapsed
        self.joules += joules
        self.latest = {
            "loss": total / count if count else math.nan,
            "images": window.images,
            "device_seconds": self.device_seconds,
            "flops": (self.flops_per_image or math.nan) * window.images,
            **({"energy_kwh": self.joules / 3.6e6} if self._meter.tells else {}),
            "images_per_second": window.new_images / window.elapsed if window.elapsed > 0 else math.nan,
            "lr": window.lr,
            **{f"loss/{name}": value / max(count, 1) for name, value in zip(window.terms, values, strict=False)},
            **by_noise_level(sums.tolist()),
        }
        if isinstance(trainer.train_dataloader, StreamLoader):
            share = waited / trainer.world_size / window.elapsed if window.elapsed > 0 else math.nan
            self.latest |= {"data_wait": share} | ({"data_replaced": replaced} if replaced else {})
        if len(values) > len(window.terms):
            self.latest["grad_norm"] = values[-1]
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=window.step)
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: L.Trainer) -> None:
        # all ranks have the same sum
        if self.max_device_seconds is not None and self.device_seconds >= self.max_device_seconds:
            trainer.should_stop = True

    def _reading(self, trainer: L.Trainer) -> tuple[float, float]:
        """The seconds of this window spent waiting for data, and the samples that had to be replaced."""
        loader = trainer.train_dataloader
        if not isinstance(loader, StreamLoader):
            return 0.0, 0.0
        waited, replaced = loader.waited - self._waited[0], loader.replaced - self._waited[1]
        self._waited = loader.waited, loader.replaced
        return waited, replaced


def by_noise_level(sums: list[list[float]]) -> dict[str, float]:
    """The mean loss of each noise-level bin that has samples, from (sum of losses, count) per bin."""
    low = [f"{edge:g}" for edge in LOGSNR_EDGES]
    names = [f"<{low[0]}", *(f"{a}..{b}" for a, b in itertools.pairwise(low)), f">{low[-1]}"]
    return {f"loss/logsnr{name}": total / n for name, (total, n) in zip(names, sums, strict=True) if n}
