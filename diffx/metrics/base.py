"""The contract of a metric of images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from diffx.metrics.values import Value


@dataclass(frozen=True)
class Observation:
    """A batch of images with all that metrics read from it; the extractor runs once for all of them.

    Arguments:
        images: uint8 `[B, C, H, W]`.
        labels: the classes asked for, int64 `[B]`, or `None`.
        index: the global sample numbers, int64 `[B]`.
        features: float `[B, D]`.
        logits: float `[B, K]`.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    features: Tensor
    logits: Tensor


class ImageMetric(nn.Module, ABC):
    """Something measured on images seen batch by batch, on any number of ranks."""

    @abstractmethod
    def update(self, seen: Observation) -> None:
        """Takes a batch in."""

    @abstractmethod
    def compute(self) -> list[Value]:
        """The values over all images of all ranks; every rank has to call it and gets the same."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets all images."""
