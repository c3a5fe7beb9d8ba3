"""No augmentation."""

from torch import Tensor

from diffx.augmentations.base import Augmentation
from diffx.utils import Keys


class NoAugmentation(Augmentation):
    """Leaves the samples as they are and tells the network nothing. Use it when nothing speaks for another."""

    def forward(self, x: Tensor, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """The samples themselves, and no condition."""
        return x, {}
