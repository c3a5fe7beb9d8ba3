"""The training log: loss, loss by noise level, rate, gradient norm, speed."""

import itertools
import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffx.data import StreamLoader
from diffx.training.energy import EnergyMeter
from diffx.training.flops import training_flops
from diffx.training.module import DiffusionModule

LOGSNR_EDGES = (-8.0, -4.0, 0.0, 4.0, 8.0)
"""Edges of the noise-level bins: `loss/logsnr<-8`, …, `loss/logsnr>8`."""


class TrainingLog(L.Callback):
    """Means over each window of n steps, written by the loggers at its end.

    Sums stay on the device: a step costs two small operations and no synchronisation.

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

    def leave_out(self, seconds: float) -> None:
        """Tells of time in this window that was not spent on training."""
        self._clock = (self._clock[0] + seconds, self._clock[1])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the open window of all ranks, so that a resumed run logs what the uninterrupted one logs."""
        checkpoint["training_log"] = _over_ranks(trainer, self.sums.clone()).cpu()
        checkpoint["training_log_terms"] = {
            name: _over_ranks(trainer, value.clone()).cpu() for name, value in self.terms.items()
        }
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
        losses = outputs["losses"]
        finite = losses.isfinite()  # the others are told of elsewhere
        terms = torch.stack([losses.where(finite, 0), finite.to(losses.dtype)], dim=1).to(self.sums.dtype)
        self.sums.index_add_(0, torch.bucketize(outputs["logsnr"], self._edges), terms)
        for name, value in outputs["terms"].items():
            # a sum of its own: the first one of a window is not the next batch's memory
            self.terms[name] = self.terms.get(name, 0) + value.sum()
        if trainer.global_step % self.every_n_steps == 0 and not trainer.fit_loop._should_accumulate():
            assert isinstance(pl_module, DiffusionModule)
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: DiffusionModule) -> None:
        sums = _over_ranks(trainer, self.sums)
        total, count = sums.sum(0).tolist()
        now, step = time.perf_counter(), trainer.global_step
        elapsed, steps = now - self._clock[0], step - self._clock[1]
        images = step * module.batch_size
        self.latest = {
            "loss": total / count if count else math.nan,
            "images": images,
            **self._costs(trainer, images, elapsed),
            "images_per_second": steps * module.batch_size / elapsed if elapsed > 0 else math.nan,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **{
                f"loss/{name}": (_over_ranks(trainer, value) / max(count, 1)).item()
                for name, value in self.terms.items()
            },
            **by_noise_level(sums.tolist()),
            **self._reading(trainer, elapsed),
        }
        if module.grad_norm is not None:
            self.latest["grad_norm"] = module.grad_norm.item()
        self._clock = (now, step)
        self.sums.zero_()
        self.terms = {}
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)
        self._stop_if_spent(trainer)

    def _costs(self, trainer: L.Trainer, images: int, elapsed: float) -> dict[str, float]:
        """What training has cost so far, on all ranks."""
        spent = _over_ranks(trainer, torch.tensor([elapsed, self._meter.joules()], device=self.sums.device)).tolist()
        self.device_seconds += spent[0]
        self.joules += spent[1]
        costs = {"device_seconds": self.device_seconds, "flops": (self.flops_per_image or math.nan) * images}
        return costs | ({"energy_kwh": self.joules / 3.6e6} if self._meter.tells else {})

    def _stop_if_spent(self, trainer: L.Trainer) -> None:
        # all ranks have the same sum
        if self.max_device_seconds is not None and self.device_seconds >= self.max_device_seconds:
            trainer.should_stop = True

    def _reading(self, trainer: L.Trainer, elapsed: float) -> dict[str, float]:
        """The share of the window's time spent waiting for data, and the samples that had to be replaced."""
        loader = trainer.train_dataloader
        if not isinstance(loader, StreamLoader):
            return {}
        waited, replaced = loader.waited - self._waited[0], loader.replaced - self._waited[1]
        self._waited = loader.waited, loader.replaced
        total = _over_ranks(trainer, self.sums.new_tensor([waited, replaced])).tolist()
        shares = {"data_wait": total[0] / trainer.world_size / elapsed if elapsed > 0 else math.nan}
        return shares | ({"data_replaced": total[1]} if loader.replaced or total[1] else {})


def _over_ranks(trainer: L.Trainer, sums: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return sums
    total = trainer.strategy.reduce(sums, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def by_noise_level(sums: list[list[float]]) -> dict[str, float]:
    """The mean loss of each noise-level bin that has samples, from (sum of losses, count) per bin."""
    low = [f"{edge:g}" for edge in LOGSNR_EDGES]
    names = [f"<{low[0]}", *(f"{a}..{b}" for a, b in itertools.pairwise(low)), f">{low[-1]}"]
    return {f"loss/logsnr{name}": total / n for name, (total, n) in zip(names, sums, strict=True) if n}
