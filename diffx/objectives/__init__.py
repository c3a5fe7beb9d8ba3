"""Objectives: what is minimised, as a function of a denoiser and clean samples."""

from diffx.objectives.base import Objective
from diffx.objectives.denoising import Denoising

__all__ = ["Denoising", "Objective"]
