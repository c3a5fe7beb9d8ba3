"""What a denoiser is told beside x_t and t."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffx.utils import Keys


class Conditioner(nn.Module, ABC):
    """Turns batches into the keyword arguments of a denoiser."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], keys: Keys | None = None) -> dict[str, Tensor]:
        """The conditions of a batch.

        Arguments:
            batch: what the data set or the user's request holds, B samples.
            keys: given in training: each sample's condition is dropped, that is replaced by the null condition, by a
                draw of its own. Without keys nothing is dropped.

        Returns:
            Tensors `[B, *]` by the names of the denoiser's arguments.
        """

    @abstractmethod
    def null(self, n: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The conditions of `n` unconditional samples: the same names, types and shapes as `forward` gives."""

    @abstractmethod
    def check(self, label: int) -> None:
        """Accepts a label that is chosen for sampling.

        Raises:
            DiffxError: if there is no such class, naming the valid range.
        """
