"""How much an error at each noise level counts."""

from abc import ABC, abstractmethod

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
