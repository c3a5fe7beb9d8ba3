"""Parameterizations: what the network's output means. They know the coefficients α and σ only."""

from diffx.parameterizations.base import Parameterization
from diffx.parameterizations.edm import EDM
from diffx.parameterizations.eps import Eps
from diffx.parameterizations.flow import FlowVelocity
from diffx.parameterizations.score import Score
from diffx.parameterizations.v import V
from diffx.parameterizations.x0 import X0

__all__ = ["EDM", "X0", "Eps", "FlowVelocity", "Parameterization", "Score", "V"]
