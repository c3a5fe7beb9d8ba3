"""The way from images to what is diffused, and back."""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module, ABC):
    """Encodes images into latents and decodes latents into images."""

    @abstractmethod
    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """What the diffusion model is trained on.

        Arguments:
            batch: holds `x`, uint8 `[B, C, H, W]`, or what the autoencoder has made of it before.

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
        """The shape (c, h, w) of the latent of one square image of `channels` and `image_size` pixels.

        Raises:
            DiffxError: if it takes no such images.
        """

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with the kind of autoencoder, its weights and the scale of its latents."""
        digest = hashlib.blake2b(type(self).__name__.encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
