"""The energy that a GPU uses, from its driver."""

import torch


class EnergyMeter:
    """Counts what a device has used since the last question; says nothing where there is no GPU or no driver's word.

    The counter is that of the board (NVML, `nvmlDeviceGetTotalEnergyConsumption`, millijoules): other processes on the
    same GPU are in it, the host is not. Needs the package nvidia-ml-py (the extra `energy`).

    Arguments:
        device: what is measured.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._handle = None if device is None or device.type != "cuda" else _handle(device)
        self._before = self._read()

    @property
    def tells(self) -> bool:
        """Whether there is anything to be read."""
        return self._before is not None

    def joules(self) -> float:
        """Energy since the last call, in joules; 0 where nothing tells."""
        before, self._before = self._before, self._read()
        return 0.0 if before is None or self._before is None else self._before - before

    def _read(self) -> float | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except pynvml.NVMLError:  # GPUs before Volta, and slices of one
            return None


def _handle(device: torch.device) -> object | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # by its name: CUDA_VISIBLE_DEVICES renumbers
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
