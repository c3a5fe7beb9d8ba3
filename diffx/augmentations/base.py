"""What is done to training samples before noise is added."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from diffx.utils import Keys


class Augmentation(nn.Module, ABC):
    """Changes training samples at random and tells the network how.

    A sample's change depends on its key alone. Where the condition is zero the sample is as it was, bit for bit: asked
    without the condition, the network makes samples like the data, not like what was made of them.

    Attributes:
        labels: how many numbers per sample the network is told.
    """

    labels: int = 0

    @abstractmethod
    def forward(self, x: Tensor, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Augments a batch.

        Arguments:
            x: encoded training samples, `[B, C, H, W]`.
            keys: the addresses of the batch's random numbers.

        Returns:
            The samples, of the same shape, and the conditions to tell: `augment` `[B, labels]`, or none.
        """
