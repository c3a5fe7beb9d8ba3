"""What everything downstream sees of a diffusion model."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from diffx.schedules import Schedule


class Denoiser(nn.Module, ABC):
    """An estimate of E[x | x_t] at every noise level, together with the schedule that defines x_t.

    Attributes:
        schedule: the forward process; the denoiser is its one owner.
    """

    schedule: Schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The denoised estimate.

        Arguments:
            x_t: noisy samples, shape `[B, *]`.
            t: times in [0, 1], shape `[]` or `[B]`.
            cond: conditions, each of shape `[B, …]`, such as `label` int64 `[B]`.

        Returns:
            x̂, shape `[B, *]`.
        """
