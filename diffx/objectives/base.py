"""The interface of training losses."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from diffx.denoisers import Preconditioned
from diffx.utils import Keys


class Objective(nn.Module, ABC):
    """A loss per sample."""

    @abstractmethod
    def forward(self, denoiser: Preconditioned, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Arguments:
            denoiser: the model in training.
            x: clean samples (pixels in [−1, 1] or latents), `[B, *]`.
            keys: the addresses of the batch's random numbers.
            cond: conditions, each `[B, …]`.

        Returns:
            `loss` `[B]`, `logsnr` `[B]` (the noise level of each sample), and further terms to log, each `[B]`.
        """
