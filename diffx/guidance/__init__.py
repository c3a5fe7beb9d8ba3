"""Guidance: denoisers around denoisers. Samplers never hear of it."""

from diffx.guidance.autoguidance import Autoguidance
from diffx.guidance.cfg import ClassifierFree, unguided
from diffx.guidance.classifier import ClassifierGuidance
from diffx.guidance.fit import accuracy_by_logsnr, fit_noisy_classifier
from diffx.guidance.guided import Guided
from diffx.guidance.interval import Interval
from diffx.guidance.negative import Negative
from diffx.guidance.noisy_classifier import NoisyClassifier
from diffx.guidance.rules import Linear, Projected, Rule
from diffx.guidance.stacked import stacked
from diffx.guidance.thresholding import DynamicThresholding, StaticThresholding, unthresholded
from diffx.guidance.unconditional import ToldNothing

__all__ = [
    "Autoguidance",
    "ClassifierFree",
    "ClassifierGuidance",
    "DynamicThresholding",
    "Guided",
    "Interval",
    "Linear",
    "Negative",
    "NoisyClassifier",
    "Projected",
    "Rule",
    "StaticThresholding",
    "ToldNothing",
    "accuracy_by_logsnr",
    "fit_noisy_classifier",
    "stacked",
    "unguided",
    "unthresholded",
]
