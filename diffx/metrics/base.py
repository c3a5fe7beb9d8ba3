"""The contract of a metric of images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from diffx.metrics.accumulators import Sums
from diffx.metrics.values import Value
from diffx.utils import DiffxError


class Inapplicable(DiffxError):  # noqa: N818 (a reason rather than an error)
    """Raised by a metric's constructor: it cannot be measured with these ingredients; the sentence says why."""


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
    """Something measured on images seen batch by batch, on any number of ranks.

    Its constructor takes a `Reference` and plain hyper-parameters, and raises `Inapplicable` where the reference lacks
    what it needs. All that it has seen is kept in `Sums`, so that it can be saved and restored.
    """

    @abstractmethod
    def update(self, seen: Observation) -> None:
        """Takes a batch in."""

    @abstractmethod
    def compute(self) -> list[Value]:
        """The values over all images of all ranks; every rank has to call it and gets the same."""

    def reset(self) -> None:
        """Forgets all images."""
        for sums in sums_of(self).values():
            sums.reset()


def sums_of(module: nn.Module) -> dict[str, Sums]:
    """All `Sums` within a module, by their path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Sums)}


def no_finite_features(value: float) -> str:
    """The note on a value that is not a number."""
    return "" if value == value else "undefined: the features are not finite, so the extractor's weights are damaged"
