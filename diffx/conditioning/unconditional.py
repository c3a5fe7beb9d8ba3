"""No conditioning."""

import torch
from torch import Tensor

from diffx.conditioning.base import Conditioner
from diffx.utils import DiffxError, Keys


class Unconditional(Conditioner):
    """Tells the denoiser nothing, whatever the images' labels."""

    def forward(self, batch: dict[str, Tensor], keys: Keys | None = None) -> dict[str, Tensor]:
        """No conditions; see `Conditioner.forward`."""
        return {}

    def null(self, n: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """No conditions."""
        return {}

    def check(self, label: int) -> None:
        """Refuses every label; see `Conditioner.check`."""
        raise DiffxError(f"the model is unconditional and cannot be asked for class {label!r}; leave the label out")
