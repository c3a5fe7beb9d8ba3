"""Autoencoders: from uint8 images to latents and back. Pixels are the identity one."""

from diffx.autoencoders.base import Autoencoder
from diffx.autoencoders.pixels import Pixels

__all__ = ["Autoencoder", "Pixels"]
