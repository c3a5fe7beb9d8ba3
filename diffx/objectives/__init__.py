"""Objectives: what is minimised, as a function of a denoiser and clean samples."""

from diffx.objectives.base import Objective
from diffx.objectives.denoising import Denoising
from diffx.objectives.elbo import ELBO
from diffx.objectives.hybrid import Hybrid

__all__ = ["ELBO", "Denoising", "Hybrid", "Objective"]
