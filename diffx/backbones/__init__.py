"""Networks F(x, logSNR, label): they know nothing of schedules, parameterizations or losses."""

from diffx.backbones.base import Backbone
from diffx.backbones.dit import DiT
from diffx.backbones.unet import UNet

__all__ = ["Backbone", "DiT", "UNet"]
