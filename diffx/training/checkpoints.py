"""Checkpoints that are whole or absent, and stopping that loses nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffx.utils import DiffxError, atomic_path, patiently
from diffx.utils.signals import StopSignal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs, then renames; reads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves atomically; a full disk is a `DiffxError` and leaves the earlier checkpoints."""
        patiently(lambda: self._save(checkpoint, path))

    def _save(self, checkpoint: dict[str, Any], path: Any) -> None:
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


class TakeSignals(L.Callback):
    """Takes over the signals, as the first of the callbacks, but after Lightning has installed its own handlers.

    Arguments:
        asked: what they are noted in.
    """

    def __init__(self, asked: StopSignal) -> None:
        self.asked = asked

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes them over; the checkpoints, the last of the callbacks, give them back."""
        self.asked.__enter__()


class Checkpoints(L.Callback):
    """Saves every n steps, at the end, and when a signal asks to stop; keeps the newest few.

    A signal only sets a flag. The ranks agree at a batch boundary, save, and stop.

    Arguments:
        directory: where `step=00001000.ckpt` files go.
        every_n_steps: steps between checkpoints.
        keep_last: how many of the newest to keep.
        keep_every_n_steps: those of multiples of it are kept for ever; None for none.
        identity: the experiment's fingerprint; a checkpoint of another one is refused.
        asked: the signals that ask to stop.
    """

    def __init__(
        self,
        directory: Path,
        every_n_steps: int,
        keep_last: int,
        keep_every_n_steps: int | None,
        identity: str,
        asked: StopSignal,
    ) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.identity = identity
        self.asked = asked
        self._saved_at = -1
        self._answer: tuple[torch.Tensor, Any] | None = None
        self._group: Any = None

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
        """Removes what a killed process has left, and opens the channel over which ranks agree."""
        self._saved_at = trainer.global_step
        if trainer.world_size > 1:
            # on the CPU: no step waits for the device
            self._group = dist.new_group(backend="gloo")
        if trainer.is_global_zero:
            for file in self.directory.glob(".step=*.tmp.ckpt"):  # left by a process killed while it saved
                file.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time, or where any rank has been asked to stop."""
        stepped = not trainer.fit_loop._should_accumulate()
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if stepped and self._agree(trainer):
            trainer.should_stop = True
        if trainer.should_stop or due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end and gives the signals back."""
        self.save(trainer)
        self.asked.__exit__()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self.asked.__exit__()

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
                if not self._kept(int(file.stem.partition("=")[2])):
                    file.unlink(missing_ok=True)

    def _kept(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _agree(self, trainer: L.Trainer) -> bool:
        """Whether any rank has been asked to stop; then all of them know by which signal.

        With several, the answer is to the question of the step before, which has come in meanwhile: nobody waits.
        """
        if trainer.world_size == 1:
            return bool(self.asked)
        before, number = self._answer, torch.tensor(self.asked.number or 0)
        self._answer = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return False
        heard, work = before
        work.wait()
        self.asked.number = int(heard) or self.asked.number
        return bool(heard)
