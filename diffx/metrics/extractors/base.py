"""The contract of an extractor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffx.utils import DiffxError


class Extractor(nn.Module, ABC):
    """A fixed network from uint8 images to features and class logits.

    Attributes:
        name: what the metrics on it are called after, as in `fd_digits`.
        dim: the number D of features; 0 if it has none.
        num_classes: the number K of logits; 0 if it has none.
        preprocessing: what is done to an image before the network, in a few words.
        paper_names: what papers call metrics on it, as `fid` for `fd`.
    """

    name: str
    dim: int
    num_classes: int
    preprocessing: str
    paper_names: Mapping[str, str] = {}

    def named(self, metric: str) -> str:
        """The name of a metric on this extractor: `fd_digits`, or what papers call it, as `fid`.

        Arguments:
            metric: `fd`, `is`, `kd`, `precision`, …
        """
        return self.paper_names.get(metric, f"{metric}_{self.name}")

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


def check_grey_or_rgb(name: str, channels: int) -> None:
    """Makes sure that images are grey or RGB, as networks for photographs take them.

    Raises:
        DiffxError: for images with another number of channels.
    """
    if channels not in (1, 3):
        raise DiffxError(
            f"extractor '{name}' takes grey or RGB images, but the data have {channels} channels: choose another "
            "extractor"
        )
