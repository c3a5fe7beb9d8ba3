"""Schedules: the forward process x_t = α(t)·x + σ(t)·z. They know nothing of denoisers, data or solvers."""

from diffx.schedules.base import LOGSNR_MAX, NoiseLevel, Schedule
from diffx.schedules.cosine import Cosine
from diffx.schedules.flow import Flow
from diffx.schedules.linear import Linear
from diffx.schedules.tabulated import Tabulated
from diffx.schedules.variance_exploding import EDM, VarianceExploding

__all__ = [
    "EDM",
    "LOGSNR_MAX",
    "Cosine",
    "Flow",
    "Linear",
    "NoiseLevel",
    "Schedule",
    "Tabulated",
    "VarianceExploding",
]
