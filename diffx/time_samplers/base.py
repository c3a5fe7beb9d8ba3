"""Which noise levels a model is trained on."""

from abc import ABC, abstractmethod

from torch import Tensor

from diffx.schedules import Schedule
from diffx.utils import Keys


class TimeSampler(ABC):
    """Draws the training times of a batch from keyed random numbers."""

    @abstractmethod
    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        """The times of a batch.

        Arguments:
            schedule: the forward process, for densities defined over noise levels.
            keys: the addresses of the batch's random numbers.

        Returns:
            t in (0, 1], shape `[B]`, and the factor by which each sample's loss is corrected, shape `[B]`: 1 but for
            samplers that only reduce variance.
        """
