"""How much an error at each noise level counts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffx.denoisers import Preconditioned


class Weighting(nn.Module, ABC):
    """w(t) ≥ 0, the weight of ‖x̂ − x‖² at time t."""

    @abstractmethod
    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        """The weights.

        Arguments:
            denoiser: the model in training; most weightings read its schedule only.
            t: times in (0, 1], shape `[B]`.

        Returns:
            w, shape `[B]`.
        """

    def penalty(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        """What is added to the weighted error; 0 unless a weighting is learned, and must be kept from vanishing.

        Arguments:
            denoiser: the model in training.
            t: times in (0, 1], shape `[B]`.

        Returns:
            The penalty per sample, shape `[B]`.
        """
        return torch.zeros_like(t)
