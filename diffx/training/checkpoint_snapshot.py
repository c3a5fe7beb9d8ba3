"""Copies of the state in host memory, which are written while training goes on."""

from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies tensors into buffers of host memory, which are kept for the next time.

    From a GPU the copies go through page-locked memory. What only an optimizer step changes is copied on a stream of
    its own, beside the next forward and backward: the step waits for it (see `hold`), the host does not. On the CPU it
    is one pass over the tensors.

    It costs a copy of the state in host memory: at float32 16 bytes per parameter with Adam and one EMA, divided by the
    number of ranks that share it; the host allocator rounds page-locked blocks up to powers of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: list[Any] = []
        self._sources: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor], late: set[str]) -> dict[str, Tensor]:
        """Starts to copy.

        The copies are to be read after `wait`, and until the next call.

        Arguments:
            tensors: what is copied, by name.
            late: names of those that nothing changes before `hold` is called.
        """
        copies = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        self._buffers = dict(copies)
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if device is None:
            _copy(copies, tensors)
            return copies
        _copy(copies, {name: tensor for name, tensor in tensors.items() if name not in late})
        self._sources = tensors  # their memory is not given to others before `hold`
        current = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            _copy(copies, {name: tensor for name, tensor in tensors.items() if name in late})
        self._copied = [current.record_event(), self._stream.record_event()]
        return copies

    def hold(self) -> None:
        """What the device is told from here on begins after the copies; costs the host nothing."""
        for copied in self._copied:
            copied.wait()
        self._sources = {}

    def wait(self) -> None:
        """Waits until the copies are made; from any thread."""
        for copied in self._copied:
            copied.synchronize()

    def clear(self) -> None:
        """Gives the memory back."""
        self._buffers, self._sources, self._copied = {}, {}, []

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is not None and (kept.dtype, kept.shape, kept.stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        ):
            return kept
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


@torch.no_grad()
def _copy(copies: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
