"""Discretizations: the times at which a sampler calls the denoiser."""

from diffx.discretizations.base import Discretization
from diffx.discretizations.beta import Beta
from diffx.discretizations.integer import Integer, Leading, Linspace
from diffx.discretizations.learned import Learned
from diffx.discretizations.sigma import Karras, LogSNR
from diffx.discretizations.uniform import Quadratic, Uniform

__all__ = [
    "Beta",
    "Discretization",
    "Integer",
    "Karras",
    "Leading",
    "Learned",
    "Linspace",
    "LogSNR",
    "Quadratic",
    "Uniform",
]
