"""No extractor, for runs that need no metrics on features."""

from torch import Tensor

from diffx.metrics.extractors.base import Extractor


class NoExtractor(Extractor):
    """Images without features: what stands on features is left out.

    Use it when only pixels matter, or nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "none"
        self.dim = 0
        self.num_classes = 0
        self.preprocessing = "none"

    @property
    def weights_hash(self) -> str:
        """Empty: there are no weights."""
        return ""

    @property
    def origin(self) -> str:
        """There are no weights."""
        return "none"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of shape `[B, 0]`."""
        empty = images.new_empty(len(images), 0).float()
        return empty, empty

    def check(self, channels: int, image_size: int) -> None:
        """Takes all images."""
