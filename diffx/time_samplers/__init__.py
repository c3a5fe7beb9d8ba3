"""Densities of the training times."""

from diffx.time_samplers.base import TimeSampler
from diffx.time_samplers.lognormal import LogNormal
from diffx.time_samplers.uniform import Stratified, Uniform

__all__ = ["LogNormal", "Stratified", "TimeSampler", "Uniform"]
