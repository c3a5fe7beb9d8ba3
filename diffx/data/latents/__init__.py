"""Latents that were encoded before, as training data."""

from diffx.data.latents.source import Latents

__all__ = ["Latents"]
