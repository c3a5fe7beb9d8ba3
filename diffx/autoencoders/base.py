"""The way from images to what is diffused, and back."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Autoencoder(nn.Module, ABC):
    """Encodes images into latents and decodes latents into images."""

    @abstractmethod
    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """What the diffusion model is trained on.

        Arguments:
            batch: holds `x`, uint8 `[B, C, H, W]`.

        Returns:
            Latents of about unit scale, float32 `[B, c, h, w]`.

        Raises:
            DiffxError: if `x` is not uint8.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """The images of latents.

        Arguments:
            latent: floating point `[B, c, h, w]`.

        Returns:
            uint8 `[B, C, H, W]`.
        """

    @abstractmethod
    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latent of one square image of `channels` and `image_size` pixels."""
