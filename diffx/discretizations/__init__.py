"""Discretizations: the times at which a sampler calls the denoiser."""

from diffx.discretizations.base import Discretization
from diffx.discretizations.integer import Integer
from diffx.discretizations.sigma import Karras, LogSNR
from diffx.discretizations.uniform import Uniform

__all__ = ["Discretization", "Integer", "Karras", "LogSNR", "Uniform"]
