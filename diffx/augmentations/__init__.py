"""Augmentations: what is done to training samples on the device, and told to the network so that it does not leak."""

from diffx.augmentations.base import Augmentation
from diffx.augmentations.geometric import Geometric
from diffx.augmentations.none import NoAugmentation

__all__ = ["Augmentation", "Geometric", "NoAugmentation"]
