"""Schedules: the forward process x_t = α(t)·x + σ(t)·z. They know nothing of denoisers, data or solvers."""

from diffx.schedules.base import LOGSNR_MAX, NoiseLevel, Schedule
from diffx.schedules.cosine import Cosine
from diffx.schedules.flow import Flow
from diffx.schedules.generalized_vp import GeneralizedVP
from diffx.schedules.laplace import Laplace
from diffx.schedules.learned import Learned
from diffx.schedules.linear import Linear
from diffx.schedules.shifted import Shifted
from diffx.schedules.sigmoid import Sigmoid
from diffx.schedules.sub_vp import SubVP
from diffx.schedules.tabulated import Tabulated
from diffx.schedules.time_shift import TimeShift
from diffx.schedules.variance_exploding import EDM, VarianceExploding
from diffx.schedules.zero_snr import ZeroSNR

__all__ = [
    "EDM",
    "LOGSNR_MAX",
    "Cosine",
    "Flow",
    "GeneralizedVP",
    "Laplace",
    "Learned",
    "Linear",
    "NoiseLevel",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "SubVP",
    "Tabulated",
    "TimeShift",
    "VarianceExploding",
    "ZeroSNR",
]
