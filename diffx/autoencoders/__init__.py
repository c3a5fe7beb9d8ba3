"""Autoencoders: from uint8 images to latents and back. Pixels are the identity one."""

from diffx.autoencoders.base import Autoencoder
from diffx.autoencoders.diffusers_kl import DiffusersKL
from diffx.autoencoders.fit import fit_kl, psnr
from diffx.autoencoders.kl import KL
from diffx.autoencoders.pixels import Pixels
from diffx.autoencoders.variational import Variational

__all__ = ["KL", "Autoencoder", "DiffusersKL", "Pixels", "Variational", "fit_kl", "psnr"]
