"""Checkpoints that are whole or absent, and stopping that loses nothing."""

import secrets
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from diffx.training.checkpoint_files import (
    SHARDS,
    dealt,
    mapped,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    shard_file,
    tensors_of,
    write_file,
)
from diffx.training.checkpoint_snapshot import Snapshot
from diffx.training.checkpoint_thread import Background
from diffx.utils import DiffxError
from diffx.utils.signals import StopSignal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs, then renames; reads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves atomically; a full disk is a `DiffxError` and leaves the earlier checkpoints."""
        write_file(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever is asked: nothing is unpickled from a stranger."""
        return read_checkpoint(path, map_location or "cpu")


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

    What is saved is a snapshot of that moment in host memory, a copy of the state. A thread writes it while training
    goes on, one at a time: the next save waits for it, the end too. An error of the write is raised at the next batch
    boundary. Several ranks that hold the same weights copy and write a share of them each (see `checkpoint_files`);
    where each holds a part of its own, as with FSDP, the first writes what Lightning gathers there.

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
        self._answer: tuple[Tensor, Any] | None = None
        self._group: Any = None
        self._writers: Any = None
        self._ranks, self._rank = 1, 0
        self._word = ""
        self._snapshot = Snapshot()
        self._writing = Background()

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
        """Removes what a killed process has left, and opens the channels over which ranks agree."""
        self._saved_at = trainer.global_step
        self._ranks, self._rank = trainer.world_size, trainer.global_rank
        if trainer.world_size > 1:
            # on the CPU: no step waits for the device; the threads talk among themselves
            self._group, self._writers = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
            self._word = trainer.strategy.broadcast(secrets.token_hex(4))
        if trainer.is_global_zero:
            remove_leftovers(self.directory)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keeps the weights as they are until they are copied."""
        self._snapshot.hold()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time, or where any rank has been asked to stop.

        Raises:
            DiffxError: if the checkpoint before could not be written.
        """
        stepped = not trainer.fit_loop._should_accumulate()
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if stepped and self._agree(trainer):
            trainer.should_stop = True
        if trainer.should_stop or due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end, waits until it is on disk, and gives the signals back."""
        self.save(trainer)
        self.wait()
        self._snapshot.clear()
        self.asked.__exit__()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back, and ends a write under way, unless the user does not want to wait."""
        self.asked.__exit__()
        self._snapshot.hold()  # the weights may be moved now
        if isinstance(exception, KeyboardInterrupt):
            return
        try:
            self.wait()
        except Exception as error:  # the first one is what ends training
            warnings.warn(str(error), stacklevel=2)

    def save(self, trainer: L.Trainer) -> None:
        """Begins to write the checkpoint of this step, once; all ranks call it.

        When it is on disk the oldest beyond `keep_last` are removed.

        Raises:
            DiffxError: if the checkpoint before could not be written, or its weights were not finite.
        """
        if trainer.global_step == self._saved_at:
            return
        self.wait()
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        tensors = tensors_of(content)
        learned = _learned(tensors, trainer.lightning_module)
        shares = self._shares({path: tensors[path] for path in learned})
        copies = self._snapshot.take(
            {path: tensor for path, tensor in tensors.items() if shares.get(path, 0) == self._rank}, learned
        )
        part = {path: copies.pop(path) for path, rank in shares.items() if rank == self._rank}
        file = self.directory / f"step={trainer.global_step:08d}.ckpt"
        shards = [shard_file(file, rank, self._ranks, self._word) for rank in range(self._ranks)] if shares else []
        if self._rank == 0:
            content = mapped(content, lambda path, tensor: copies.get(path, torch.empty_like(tensor, device="meta")))
            content |= {SHARDS: [shard.name for shard in shards]} if shards else {}
        weights = [tensor for path, tensor in (copies | part).items() if path in learned and _is_weight(path)]
        self._writing.start(partial(self._write, trainer.global_step, file, content, shards, part, weights))
        self._saved_at = trainer.global_step

    def wait(self) -> None:
        """Waits until the checkpoint under way is on disk.

        Raises:
            DiffxError: if it could not be written, or its weights were not finite: no run could be resumed from them.
        """
        self._writing.wait()

    def _write(
        self,
        step: int,
        file: Path,
        content: dict[str, Any],
        shards: list[Path],
        part: dict[str, Tensor],
        weights: list[Tensor],
    ) -> None:
        """In the thread: the shards, then the file that names them, then the oldest go."""

        def shard() -> None:
            if not all(map(_is_finite, weights)):
                raise DiffxError(
                    f"the weights are not finite at step {step} and are not saved; lower optimizer.lr, set "
                    "training.gradient_clip_val=1, or use training.precision=32-true, and train anew"
                )
            if shards:
                write_file(part, shards[self._rank])

        def main() -> None:
            if self._rank == 0:
                write_file(content, file)

        self._snapshot.wait()
        error = self._together(shard) or self._together(main)
        if error is not None:
            if shards:
                shards[self._rank].unlink(missing_ok=True)
            raise error
        if self._rank == 0:
            for old in sorted(self.directory.glob("step=*.ckpt"))[: -self.keep_last]:
                if not self._kept(int(old.stem.partition("=")[2])):
                    remove_checkpoint(old)

    def _together(self, work: Callable[[], None]) -> Exception | None:
        """Works on this rank, and returns on all of them the error of any."""
        mine: Exception | None = None
        try:
            work()
        except Exception as error:
            mine = error
        if self._ranks == 1:
            return mine
        said: list[str | None] = [None] * self._ranks
        dist.all_gather_object(said, None if mine is None else str(mine), group=self._writers)
        return mine or next((DiffxError(each) for each in said if each is not None), None)

    def _shares(self, learned: dict[str, Tensor]) -> dict[str, int]:
        """Which rank writes which tensor; empty where the first writes all: alone, or if not all hold the same."""
        if self._ranks == 1:
            return {}
        sizes = {path: tensor.nbytes for path, tensor in learned.items()}
        held = zlib.crc32(repr(sorted(sizes.items())).encode())
        extremes = torch.tensor([held, -held])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        return dealt(sizes, self._ranks) if extremes.sum() == 0 else {}

    def _kept(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _agree(self, trainer: L.Trainer) -> bool:
        """Whether any rank has been asked to stop; then all of them know by which signal.

        With several, the answer is to the question of the step before, which has come in meanwhile: nobody waits.

        Raises:
            DiffxError: if a checkpoint could not be written, on all ranks at the same step.
        """
        if self._ranks == 1:
            if self._writing.failed:
                self.wait()
            return bool(self.asked)
        before, numbers = self._answer, torch.tensor([self.asked.number or 0, self._writing.failed])
        self._answer = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return False
        heard, work = before
        work.wait()
        number, failed = heard.tolist()
        if failed:
            self.wait()
        self.asked.number = number or self.asked.number
        return bool(number)


def _learned(tensors: dict[str, Tensor], module: L.LightningModule) -> set[str]:
    """Paths of weights, averages and moments: the same on all ranks, and changed by the optimizer step only."""
    buffers = {f"state_dict/{name}" for name, _ in module.named_buffers(remove_duplicate=False)}
    return {
        path for path in tensors if path.startswith("optimizer_states/") or (_is_weight(path) and path not in buffers)
    }


def _is_weight(path: str) -> bool:
    return path.startswith("state_dict/")


def _is_finite(tensor: Tensor) -> bool:
    # the sum is quick, and finite only if all are; it can overflow
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
