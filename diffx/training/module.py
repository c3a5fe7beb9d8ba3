"""The LightningModule: batch → autoencoder → augmentation → objective(denoiser) → loss.

All else in training is a callback.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from diffx.augmentations import Augmentation, NoAugmentation
from diffx.autoencoders import Autoencoder
from diffx.conditioning import Conditioner
from diffx.denoisers import Preconditioned
from diffx.objectives import Objective
from diffx.training.ema import EMA
from diffx.training.lr_schedules import LRSchedule
from diffx.utils import Keys

NONE = torch.iinfo(torch.int64).max
"""In the place of a sample number: there is none."""


class DiffusionModule(L.LightningModule):
    """Trains a denoiser and keeps its EMA.

    Arguments:
        denoiser: the model.
        objective: the loss; its parameters (learned weightings) are trained too.
        autoencoder: gives the latents, or the pixels in [−1, 1]; frozen.
        conditioner: gives the conditions, with drop-out.
        ema: the average of `denoiser`.
        optimizer: makes the optimizer from the parameters.
        lr_schedule: factor of the learning rate per step.
        seed: the seed of all random numbers of training.
        batch_size: the global batch, over all ranks and accumulated micro-batches.
        augmentation: what is done to the encoded samples; nothing by default.

    Attributes:
        grad_norm: the norm of the last clipped gradient, `[]`.
        first_nonfinite: the number of the first sample without a finite loss or gradient, int64 `[]`, or `NONE`.
    """

    def __init__(
        self,
        denoiser: Preconditioned,
        objective: Objective,
        autoencoder: Autoencoder,
        conditioner: Conditioner,
        ema: EMA,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        lr_schedule: LRSchedule,
        seed: int,
        batch_size: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.autoencoder = autoencoder.requires_grad_(False)
        self.conditioner = conditioner
        self.ema = ema
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.seed = seed
        self.batch_size = batch_size
        self.augmentation = augmentation or NoAugmentation()
        self.grad_norm: Tensor | None = None
        self.first_nonfinite = torch.tensor(NONE)  # on the device, so that no step waits for it

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """The loss of a micro-batch.

        Arguments:
            batch: `x`, `index` (global sample numbers) and what the conditioner reads.
            batch_idx: unused: nothing depends on how samples are batched.

        Returns:
            `loss` `[]`, and for the log, per sample, `losses` `[B]`, `logsnr` `[B]` and the objective's further
            `terms`.
        """
        keys = Keys(self.seed, batch["index"], total=self.batch_size)
        with torch.no_grad():
            x, augmented = self.augmentation(self.autoencoder.encode(batch), keys)
        terms = self.objective(self.denoiser, x, keys, **self.conditioner(batch, keys), **augmented)
        losses = terms["loss"]
        self._watch(losses.detach(), batch["index"])
        further = {name: value.detach() for name, value in terms.items() if name not in ("loss", "logsnr")}
        return {"loss": losses.mean(), "losses": losses.detach(), "logsnr": terms["logsnr"], "terms": further}

    def _watch(self, losses: Tensor, index: Tensor) -> None:
        """Remembers the first sample whose loss is not finite, over all steps until somebody asks."""
        first = index.masked_fill(losses.isfinite(), NONE).min()
        self.first_nonfinite = torch.minimum(first, self.first_nonfinite)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module, but at once where Lightning notes which hook runs, forty times per step."""
        if name == "_current_fx_name":  # a string: torch would look for what else it could be
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the autoencoder out: it is frozen, and can be larger than the model."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("autoencoder.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the autoencoder as it is."""
        checkpoint["state_dict"] |= self.autoencoder.state_dict(prefix="autoencoder.")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the learning rate schedule per step."""
        parameters = [p for p in (*self.denoiser.parameters(), *self.objective.parameters()) if p.requires_grad]
        optimizer = self.make_optimizer(parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm, and keeps that norm for the log."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.grad_norm = norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
            first = self.trainer.global_step * self.batch_size
            fine = norm.isfinite() | (self.first_nonfinite < NONE)
            self.first_nonfinite = torch.where(fine, self.first_nonfinite, first)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One optimizer step and one update of the EMA, whatever the accumulation."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning counts the step after this hook
        self.ema.update(self.denoiser, self.trainer.global_step + 1)

    def on_train_start(self) -> None:
        """Gives what an optimizer has been loaded with the memory layout of its parameters.

        A checkpoint may come from a run of the other layout, and fused optimizers go through memory as it lies.
        """
        optimizers = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizers, torch.optim.Optimizer)
        for parameter, state in optimizers.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seeds the network's drop-out from the step, so that a resumed run drops what the first would have dropped."""
        micro = batch_idx % self.trainer.accumulate_grad_batches
        seed = hash((self.seed, self.trainer.global_step, micro, self.trainer.global_rank))
        # torch.manual_seed would format the call stack for each kind of device that this machine does not have
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
