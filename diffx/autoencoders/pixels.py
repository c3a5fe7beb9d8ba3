"""Diffusion in pixel space."""

import torch
from torch import Tensor

from diffx.autoencoders.base import Autoencoder
from diffx.utils import DiffxError


class Pixels(Autoencoder):
    """The identity: latents are the pixels themselves, scaled from 0..255 to [-1, 1]."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """`x / 127.5 - 1`, float32 `[B, C, H, W]`; see `Autoencoder.encode`."""
        x = batch["x"]
        if x.dtype != torch.uint8:
            raise DiffxError(f"images are {x.dtype}; the data set must give them as uint8 of 0..255, not yet scaled")
        return x.to(torch.float32).div_(127.5).sub_(1)

    def decode(self, latent: Tensor) -> Tensor:
        """The nearest of the 256 values, uint8 `[B, C, H, W]`; what lies outside [-1, 1] is clamped."""
        return latent.to(torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """The image's own shape."""
        return channels, image_size, image_size
