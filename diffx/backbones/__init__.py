"""Networks F(x, logSNR, label): they know nothing of schedules, parameterizations or losses."""

from diffx.backbones.base import Backbone
from diffx.backbones.dit import DiT
from diffx.backbones.flat_unet import FlatUNet
from diffx.backbones.score_unet import ScoreUNet
from diffx.backbones.simple_unet import SimpleUNet
from diffx.backbones.speed import speed_up
from diffx.backbones.unet import UNet

__all__ = ["Backbone", "DiT", "FlatUNet", "ScoreUNet", "SimpleUNet", "UNet", "speed_up"]
