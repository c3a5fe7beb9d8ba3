"""The contract of an extractor."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Extractor(nn.Module, ABC):
    """A fixed network from uint8 images to features and class logits.

    Attributes:
        name: what the metrics on it are called after, as in `fd_digits`.
        fd_name: the name of the Fréchet distance on it, as `fid` or `fd_digits`.
        is_name: the name of the Inception Score on it, as `is` or `is_digits`.
        dim: the number D of features; 0 if it has none.
        num_classes: the number K of logits.
        preprocessing: what is done to an image before the network, in a few words.
    """

    name: str
    fd_name: str
    is_name: str
    dim: int
    num_classes: int
    preprocessing: str

    @property
    @abstractmethod
    def weights_hash(self) -> str:
        """The sha256 of the weights, in hexadecimal digits."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the weights come from, in a few words."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits.

        Arguments:
            images: uint8 `[B, C, H, W]`.

        Returns:
            The features, float `[B, D]`, and the logits, float `[B, K]`.
        """

    @abstractmethod
    def check(self, channels: int, image_size: int) -> None:
        """Makes sure that images of this shape can be taken.

        Raises:
            DiffxError: if they cannot.
        """

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def protocol(self) -> dict[str, str]:
        """What has to be told beside a number that stands on this extractor."""
        return {
            "extractor": self.name,
            "weights_hash": self.weights_hash,
            "weights_origin": self.origin,
            "preprocessing": self.preprocessing,
        }


def extract(extractor: Extractor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[B, D]` and logits `[B, K]` of uint8 images `[B, C, H, W]`: no gradients, evaluation mode, float32.

    Raises:
        TypeError: if the images are not uint8 `[B, C, H, W]`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise TypeError(f"images must be uint8 [B, C, H, W], not {images.dtype} {list(images.shape)}")
    device = extractor.device
    # a training loop in bfloat16 must not change the metric
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return extractor.eval()(images.to(device))
