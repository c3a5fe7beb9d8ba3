"""Losses and gradients that are not finite: training stops with what caused it, or leaves the step out."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist

from diffx.training.module import NONE, DiffusionModule
from diffx.training.processes import over_ranks
from diffx.utils import DiffxError, write_text
from diffx.utils.transfer import HostCopy

PATIENCE = 10
"""Steps left out in a row before training stops all the same."""


class NonFinite(L.Callback):
    """Watches for losses and gradients that are not finite.

    `stop` looks now and then, on a GPU at what was true a step before, so that nobody waits, and before a checkpoint is
    written; it ends training with the first offending step: run again, it would come to the same. `skip` looks at every
    step, which costs a synchronisation each, and leaves weights and optimizer as they are where it must; the learning
    rate, the data and the step count go on. Both keep the sample numbers of the offending batches in a file.

    Arguments:
        mode: `stop` or `skip`.
        every_n_steps: at which steps `stop` looks.
        save_every_n_steps: at which steps, beside these, it looks at once.
        file: where the batches are listed, a JSON object per line: `step`, `first` (the number of the first offending
            sample), `samples` (the batch, first and last number).
    """

    def __init__(self, mode: Literal["stop", "skip"], every_n_steps: int, save_every_n_steps: int, file: Path) -> None:
        if mode not in ("stop", "skip"):
            raise DiffxError(f"training.nonfinite is '{mode}'; set it to stop or skip")
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.save_every_n_steps = save_every_n_steps
        self.file = Path(file)
        self._in_a_row = 0
        self._first: HostCopy | None = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leaves the step out where it must: a parameter without a gradient is not touched by the optimizer.

        Raises:
            DiffxError: after too many of them in a row.
        """
        if self.mode == "stop":
            return
        assert isinstance(pl_module, DiffusionModule)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        fine = torch.nn.utils.get_total_norm(gradients).isfinite() & (pl_module.first_nonfinite == NONE)
        # the gradients are those of all ranks, the losses are not
        if bool(trainer.strategy.reduce_boolean_decision(bool(fine), all=True)):
            self._in_a_row = 0
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._in_a_row += 1
        step = trainer.global_step
        first = self._report(trainer, pl_module)
        pl_module.first_nonfinite = torch.full_like(pl_module.first_nonfinite, NONE)
        if self._in_a_row > PATIENCE:
            raise DiffxError(
                f"{self._in_a_row} steps in a row, the last of them step {step}, had no finite loss or gradient (first "
                f"in sample {first}; see '{self.file}'); lower optimizer.lr, or use training.precision=32-true, and "
                "train anew"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops where something was not finite.

        Raises:
            DiffxError: naming the step and the sample.
        """
        if self.mode == "skip" or trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, DiffusionModule)
        saves = trainer.global_step % self.save_every_n_steps == 0
        before, self._first = self._first, None
        if saves or trainer.global_step % self.every_n_steps == 0:
            self._first = HostCopy(over_ranks(pl_module.first_nonfinite, dist.ReduceOp.MIN))
            if saves or pl_module.device.type == "cpu":
                before, self._first = self._first, None
        if before is None or int(before.read()) == NONE:
            return
        first = self._report(trainer, pl_module)
        raise DiffxError(
            f"the loss or its gradient is not finite since step {first // pl_module.batch_size} (first in sample "
            f"{first}; the batch is listed in '{self.file}'); lower optimizer.lr, set training.gradient_clip_val=1, "
            "use training.precision=32-true, or leave such steps out by training.nonfinite=skip"
        )

    def _report(self, trainer: L.Trainer, module: DiffusionModule) -> int:
        """Adds a line to the file; returns the first offending sample's number, over all ranks."""
        first = int(over_ranks(module.first_nonfinite, dist.ReduceOp.MIN))
        batch = module.batch_size
        # a gradient can overflow where no loss did: then it is the whole batch
        step = trainer.global_step if first >= NONE else first // batch
        first = step * batch if first >= NONE else first
        if trainer.is_global_zero:
            row = {"step": step, "first": first, "samples": [step * batch, (step + 1) * batch - 1]}
            before = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
            if json.dumps(row) not in before.splitlines():  # a resumed run meets it again
                write_text(self.file, f"{before}{json.dumps(row)}\n")
        return first
