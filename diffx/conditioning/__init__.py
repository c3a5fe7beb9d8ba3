"""Conditioning: from batches to what the denoiser is told, with drop-out per sample."""

from diffx.conditioning.base import Conditioner
from diffx.conditioning.label import LabelConditioner
from diffx.conditioning.unconditional import Unconditional

__all__ = ["Conditioner", "LabelConditioner", "Unconditional"]
