"""Training on Lightning: the module, its callbacks, and the fit."""

from diffx.training.ema import EMA
from diffx.training.module import DiffusionModule

__all__ = ["EMA", "DiffusionModule"]
