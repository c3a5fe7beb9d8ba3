"""Likelihoods: how probable a denoiser makes data, exactly or as a bound, in nats per sample and bits per dimension."""

from diffx.likelihood.base import Likelihood, bits_per_dim, gaussian_nats
from diffx.likelihood.continuous import ContinuousBound
from diffx.likelihood.discrete import DiscreteBound
from diffx.likelihood.probability_flow import ProbabilityFlow

__all__ = ["ContinuousBound", "DiscreteBound", "Likelihood", "ProbabilityFlow", "bits_per_dim", "gaussian_nats"]
