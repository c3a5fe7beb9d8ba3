"""Which noise levels a model is trained on."""

from abc import ABC, abstractmethod

from torch import Tensor

from diffx.schedules import Schedule
from diffx.utils import Keys


class TimeSampler(ABC):
    """Draws the training times of a batch from keyed random numbers.

    One that adapts to the losses is an `nn.Module` too and keeps what it has learned in buffers, which are part of the
    objective and so of its checkpoints. What it is told in one optimizer step it uses from the next one on, so that
    the times do not depend on how the global batch is cut into ranks and micro-batches.
    """

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

    def update(self, t: Tensor, loss: Tensor) -> None:  # noqa: B027
        """Takes note of the losses of the batch drawn last; nothing to do unless the density adapts.

        Called once per batch in training, on all ranks at the same time.

        Arguments:
            t: the times drawn, shape `[B]`.
            loss: the weighted loss of each sample, not corrected, shape `[B]`; what is not finite counts as 0.
        """
