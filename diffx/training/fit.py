"""One fit, from where its newest checkpoint stands to its last step."""

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler

from diffx.training.checkpoint_files import read_checkpoint, shards_of
from diffx.training.checkpoints import AtomicCheckpointIO, Checkpoints, TakeSignals
from diffx.training.loggers import CSVLogger
from diffx.training.module import DiffusionModule
from diffx.training.processes import started_by
from diffx.utils import DiffxError


@dataclass(frozen=True)
class Outcome:
    """How a fit ended.

    Arguments:
        step: the optimizer steps done.
        signal: the signal that stopped it, None if it finished.
        trainer: the trainer, for what follows on the same ranks.
    """

    step: int
    signal: int | None
    trainer: L.Trainer


def fit(
    module: DiffusionModule,
    data: L.LightningDataModule,
    *,
    checkpoints: Checkpoints,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
    resume: Path | None,
    max_steps: int,
    precision: str,
    gradient_clip_val: float | None,
    accelerator: str,
    devices: int,
    num_nodes: int,
    strategy: str,
    accumulate_grad_batches: int,
) -> Outcome:
    """Trains to `max_steps`, or to the next batch boundary after a signal.

    Arguments:
        module: what is trained.
        data: its data.
        checkpoints: when and where to save; the last of the callbacks, so that it saves what the others have done.
        callbacks: the others.
        loggers: the loggers.
        resume: the checkpoint to start from.
        max_steps: optimizer steps, ≥ 1.
        precision: Lightning's precision, such as `32-true` or `bf16-mixed`.
        gradient_clip_val: largest global norm of the gradient; None for no clipping.
        accelerator: Lightning's accelerator.
        devices: processes on each node, one device each.
        num_nodes: number of nodes.
        strategy: Lightning's strategy.
        accumulate_grad_batches: micro-batches per optimizer step.

    Raises:
        DiffxError: if the checkpoint is of another experiment, or cannot be written.
    """
    if "fsdp" in strategy and accelerator not in ("gpu", "cuda"):
        raise DiffxError(f"trainer.strategy={strategy} needs GPUs (trainer=gpu); on CPUs use trainer.strategy=auto")
    if "fsdp" in strategy and resume is not None and shards_of(resume):  # Lightning's FSDP reads the file itself
        raise DiffxError(
            f"the checkpoint '{resume}' is in shards, which trainer.strategy={strategy} cannot read; use "
            "trainer.strategy=auto"
        )
    _quieten()
    environment = started_by()
    plugins: list[Any] = [AtomicCheckpointIO(), *([environment] if environment else [])]
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,  # pyright: ignore[reportArgumentType]
        logger=list(loggers),
        callbacks=[TakeSignals(checkpoints.asked), *callbacks, checkpoints],
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        plugins=plugins,
        profiler=_NoProfiler(),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_autolog_hparams=False,
    )
    # set by Lightning; the optimizer asks for CUDA at every step, and would look for the driver's library each time
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    step = 0 if resume is None else _peek(resume)
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.resume(step)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    return Outcome(trainer.global_step, checkpoints.asked.number if trainer.global_step < max_steps else None, trainer)


def _peek(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    try:
        return int(read_checkpoint(checkpoint, mmap=True)["global_step"])
    except Exception as error:  # torch raises half a dozen unrelated types for a damaged file
        raise DiffxError(
            f"the checkpoint '{checkpoint}' is damaged ({str(error).splitlines()[0]}); delete it to resume from the "
            "one before"
        ) from error


class _NoProfiler(PassThroughProfiler):
    """Nothing, fifty times per step, at a fifth of the cost of Lightning's own nothing."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _NOTHING


_NOTHING = nullcontext()


def _quieten() -> None:
    """Lightning's advice for other set-ups than this one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of a GPU that trainer=cpu does not want
    for message in (
        ".*does not have many workers.*",
        ".*`max_epochs` was not set.*",
        ".*no `val_dataloader`.*",
        ".*GPU available but not used.*",
        ".*Trainer was signaled to stop.*",
        ".*srun. command is available.*",
        ".*in eval mode at the start of training.*",  # the EMA's copy
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("PL_RECOMMEND_DISABLE", "1")
