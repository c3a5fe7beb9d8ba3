"""Values on their way from a device to the host."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor that the host reads later, so that nobody waits for the device now.

    On a GPU the copy takes its place in the queue behind what the tensor is computed from; reading it waits for that
    much and no more, which a step later is done. On the CPU it is there at once.

    Arguments:
        tensor: the values, of any shape and device.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event = None
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values = tensor.clone()

    @property
    def ready(self) -> bool:
        """Whether reading would not wait."""
        return self._event is None or self._event.query()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def to_device(values: list[float], device: torch.device) -> Tensor:
    """A few numbers of the host on a device, float32 `[n]`, without waiting for it."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
