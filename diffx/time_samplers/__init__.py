"""Densities of the training times."""

from diffx.time_samplers.adaptive import Adaptive
from diffx.time_samplers.base import TimeSampler
from diffx.time_samplers.cosine_map import CosineMap
from diffx.time_samplers.importance import Importance
from diffx.time_samplers.logit_normal import LogitNormal
from diffx.time_samplers.lognormal import LogNormal
from diffx.time_samplers.low_discrepancy import LowDiscrepancy
from diffx.time_samplers.mode import Mode
from diffx.time_samplers.uniform import Stratified, Uniform

__all__ = [
    "Adaptive",
    "CosineMap",
    "Importance",
    "LogNormal",
    "LogitNormal",
    "LowDiscrepancy",
    "Mode",
    "Stratified",
    "TimeSampler",
    "Uniform",
]
