"""Batches from worker processes: few copies, and errors as they were raised."""

import ctypes
import math
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diffx.data.base import Batch
from diffx.utils import DiffxError

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor of a batch."""

_Places = dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]
_AHEAD = 2  # batches that each worker reads ahead
BLOCKS = _AHEAD + 2
"""Blocks of shared memory that a worker needs, each the size of a batch of one rank."""
_MOST_BLOCKS = 32  # more than that are not kept: somebody collects batches
_BUSY = 1  # where the header of a block says that it is in use
_ALIGNED = 64
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class StreamLoader(DataLoader[Batch]):
    """Hands on the batches that a stream gives for ranges of sample numbers, in their order.

    A worker writes its batches to blocks of memory that it shares with this process, and takes a block again when
    nothing here refers to its batch any more: fresh shared memory for each batch, as torch has it, costs more than
    decoding small images does. What goes wrong in a worker is raised here as the one sentence that it is.

    Arguments:
        stream: gives a batch for a range of sample numbers, by `__getitems__`.
        batches: the ranges.
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: whether batches are put into page-locked memory.
    """

    waited: float
    """Seconds spent waiting for batches so far."""
    replaced: int
    """Samples so far that could not be read and were replaced: where batches have `replaced`, it is counted here."""

    def __init__(
        self, stream: Dataset[Batch], batches: Iterable[range], workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.waited = 0.0
        self.replaced = 0
        self._pin = pin_memory
        super().__init__(
            _Reporting(stream),
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]: a range is passed on as it is
            collate_fn=_identity,  # pyright: ignore[reportArgumentType]: `__getitems__` gives no list
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_end_with_parent,
            # for the workers' seeds, which nothing uses; otherwise they are drawn from the global generator
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batches.

        Raises:
            DiffxError: what the stream raises, and if a worker dies.
        """
        handler = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if threading.current_thread() is threading.main_thread():
            # torch's own raises in the midst of a training step; that a worker is dead is noticed below as well
            signal.signal(signal.SIGCHLD, handler)
        blocks: dict[tuple[int, int], Tensor] = {}
        while True:
            started = time.perf_counter()
            found = _next(batches)
            if isinstance(found, DiffxError):
                del batches  # ends the workers
                raise found
            if isinstance(found, _Parcel):
                batch = _opened(found, blocks, self._pin)
            else:
                batch = {name: value.pin_memory() for name, value in found.items()} if self._pin else found
            if "replaced" in batch:
                self.replaced += int(batch.pop("replaced").sum())
            self.waited += time.perf_counter() - started
            yield batch


def new_batch(layout: Layout) -> Batch:
    """Tensors to be filled with a batch; in a worker of `StreamLoader` they lie where no copy is needed to send them.

    Arguments:
        layout: type and shape of each.
    """
    places, size = _arranged(layout)
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, _Reporting):
        return _fields(worker.dataset.next_block(size), places)
    return _fields(torch.empty(size, dtype=torch.uint8), places)


class _Parcel(NamedTuple):
    """What a worker sends instead of a batch.

    Arguments:
        worker: which worker.
        block: which of its blocks; -1 for one that is used this once.
        memory: the block, if this process does not know it yet.
        number: how many parcels the worker sent before.
        size: the bytes of the block that matter.
        layout: type, shape, strides and first byte of each tensor.
    """

    worker: int
    block: int
    memory: Tensor | None
    number: int
    size: int
    layout: _Places


class _Reporting(Dataset[Any]):
    """A stream whose batches and errors travel from a worker as parcels and single sentences."""

    def __init__(self, stream: Dataset[Batch]) -> None:
        self.stream = stream
        self._blocks: list[Tensor] = []
        self._unknown: set[int] = set()
        self._next = -1, torch.empty(0, dtype=torch.uint8)
        self._number = 0

    def __getitems__(self, samples: Sequence[int]) -> Batch | _Parcel | DiffxError:
        worker = get_worker_info()
        try:
            batch = self.stream.__getitems__(samples)  # pyright: ignore[reportAttributeAccessIssue]
        except DiffxError as error:
            if worker is None:
                raise
            return error
        return batch if worker is None else self._parcel(batch, worker.id)

    def next_block(self, size: int) -> Tensor:
        """The memory for the next batch, uint8, of at least this size."""
        free = next((k for k, block in enumerate(self._blocks) if not _header(block)[_BUSY]), -1)
        if free >= 0 and len(self._blocks[free]) >= size:
            block = self._blocks[free]
        else:
            block = _shared(size)
            if free < 0 and len(self._blocks) < _MOST_BLOCKS:
                free = len(self._blocks)
                self._blocks.append(block)
            if free >= 0:
                self._blocks[free] = block
                self._unknown.add(free)
        self._next = free, block
        return block

    def _parcel(self, batch: Batch, worker: int) -> _Parcel:
        k, block = self._next
        if all(value.untyped_storage().data_ptr() == block.data_ptr() for value in batch.values()):
            places = {name: _place(value) for name, value in batch.items()}
        else:
            places, size = _arranged({name: (value.dtype, tuple(value.shape)) for name, value in batch.items()})
            block = self.next_block(size)
            for name, field in _fields(block, places).items():
                field.copy_(batch[name])
            k = self._next[0]
        _header(block)[:] = self._number, True
        known = k >= 0 and k not in self._unknown
        self._unknown.discard(k)
        self._next = -1, torch.empty(0, dtype=torch.uint8)
        self._number += 1
        return _Parcel(worker, k, None if known else block, self._number - 1, _end(places), places)


def _opened(parcel: _Parcel, blocks: dict[tuple[int, int], Tensor], pin_memory: bool) -> Batch:
    """The batch of a parcel: its block is free again when the last of its tensors is gone."""
    key = parcel.worker, parcel.block
    if parcel.memory is not None:
        blocks[key] = parcel.memory
    block = blocks[key]
    header = _header(block)
    if header.tolist() != [parcel.number, True]:
        raise RuntimeError("a block was taken again before its batch was read")
    if pin_memory:
        own = torch.empty(parcel.size, dtype=torch.uint8, pin_memory=True).copy_(block[: parcel.size])
        header[_BUSY] = False
    else:
        view = block.numpy()[: parcel.size]
        own = torch.frombuffer(view, dtype=torch.uint8)  # refers to the view as long as any part of it is in use
        weakref.finalize(view, header.__setitem__, _BUSY, False).atexit = False
    return _fields(own, parcel.layout)


def _shared(size: int) -> Tensor:
    """A block that processes share, of no batch yet."""
    storage: Any = torch.UntypedStorage._new_shared(size)
    block = torch.empty(0, dtype=torch.uint8)
    block.set_(storage, 0, (size,))  # pyright: ignore[reportCallIssue]
    _header(block)[:] = 0
    return block


def _header(block: Tensor) -> np.ndarray:
    """The number of the batch in a block, and whether it is in use, int64 `[2]`."""
    return block[: 2 * 8].numpy().view(np.int64)


def _arranged(layout: Layout) -> tuple[_Places, int]:
    """Type, shape, strides and first byte of each tensor, one behind the other after a header, and the bytes of all."""
    places, end = {}, _ALIGNED
    for name, (dtype, shape) in layout.items():
        strides = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        places[name] = dtype, shape, strides, end
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return places, end


def _place(value: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    return value.dtype, tuple(value.shape), value.stride(), int(value.storage_offset()) * value.dtype.itemsize


def _end(places: _Places) -> int:
    return max(start + _span(shape, strides) * dtype.itemsize for dtype, shape, strides, start in places.values())


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between the first and the last of a tensor, both counted."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def _fields(block: Tensor, places: _Places) -> Batch:
    return {
        name: block[start : start + _span(shape, strides) * dtype.itemsize].view(dtype).as_strided(shape, strides)
        for name, (dtype, shape, strides, start) in places.items()
    }


def _end_with_parent(worker: int) -> None:
    """Ends this process when the training process is killed, at once: it would keep that one's locks and memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _next(batches: Iterator[Any]) -> Batch | _Parcel | DiffxError:
    """The next thing that comes; an error that a worker reports, or that of a worker that has died, is returned."""
    workers = getattr(batches, "_workers", ())
    try:
        return next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        # a worker that dies while it hands a block over breaks the connection
        lost = isinstance(error, OSError | EOFError) or str(error).startswith("DataLoader worker")
        if not workers or not lost:
            raise
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    how = "" if not codes else f" (exit code {codes[0]})" if codes[0] > 0 else f" ({signal.Signals(-codes[0]).name})"
    return DiffxError(
        f"a process that reads data has died{how}, most often for want of memory (SIGKILL) or of shared memory "
        "(SIGBUS); lower data.num_workers or data.batch_size, or enlarge /dev/shm"
    )


def _identity(batch: Batch) -> Batch:
    return batch
