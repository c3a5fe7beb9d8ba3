"""Checkpoints that are whole or absent, and stopping that loses nothing."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffx.utils import DiffxError, atomic_path
from diffx.utils.signals import StopSignal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs, then renames; reads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves atomically; a full disk is a `DiffxError` and leaves the earlier checkpoints."""
        with atomic_path(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
                raise DiffxError(
                    f"cannot write the checkpoint '{path}': {error}; free some space, then run the same command again "
                    "to resume"
                ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever is asked: nothing is unpickled from a stranger."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Checkpoints(L.Callback):
    """Saves every n steps, at the end, and when a signal asks to stop; keeps the newest few.

    A signal only sets a flag. The ranks agree at the next batch boundary, save, and stop.

    Arguments:
        directory: where `step=00001000.ckpt` files go.
        every_n_steps: steps between checkpoints.
        keep_last: how many of the newest to keep.
        identity: the experiment's fingerprint; a checkpoint of another one is refused.
    """

    def __init__(self, directory: Path, every_n_steps: int, keep_last: int, identity: str) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.identity = identity
        self.signal: int | None = None
        self._asked = StopSignal()
        self._saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint: which experiment it is of."""
        return {"identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses the checkpoint of another experiment.

        Raises:
            DiffxError: if the fingerprints differ.
        """
        if state_dict["identity"] != self.identity:
            raise DiffxError(
                f"the checkpoint in '{self.directory}' is of another config ({state_dict['identity']}, not "
                f"{self.identity}); remove it to start anew, or train in another runs_dir"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the signals, after Lightning has installed its own handlers."""
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            for file in self.directory.glob(".step=*.tmp.ckpt"):  # left by a process killed while it saved
                file.unlink(missing_ok=True)
        self._asked.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time, or where any rank has been asked to stop."""
        stepped = not trainer.fit_loop._should_accumulate()
        stop = stepped and self._any_rank(trainer, bool(self._asked))
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if stop:
            self.signal = self._asked.number or signal.SIGTERM
            trainer.should_stop = True
        if stop or due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end and gives the signals back."""
        self.save(trainer)
        self._asked.__exit__()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._asked.__exit__()

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint of this step, once, and removes the oldest beyond `keep_last`; all ranks call it.

        Raises:
            DiffxError: if the weights are not finite: no run could be resumed from them.
        """
        if trainer.global_step == self._saved_at:
            return
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            raise DiffxError(
                f"the weights are not finite at step {trainer.global_step} and are not saved; lower optimizer.lr, "
                "set training.gradient_clip_val=1, or use training.precision=32-true, and train anew"
            )
        trainer.save_checkpoint(self.directory / f"step={trainer.global_step:08d}.ckpt")
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            for file in sorted(self.directory.glob("step=*.ckpt"))[: -self.keep_last]:
                file.unlink(missing_ok=True)

    def _any_rank(self, trainer: L.Trainer, flag: bool) -> bool:
        if trainer.world_size == 1:
            return flag
        return trainer.strategy.reduce_boolean_decision(flag, all=False)
