"""Guidance: denoisers around denoisers. Samplers never hear of it."""

from diffx.guidance.cfg import ClassifierFree, unguided
from diffx.guidance.thresholding import StaticThresholding, unthresholded

__all__ = ["ClassifierFree", "StaticThresholding", "unguided", "unthresholded"]
