"""Denoisers x̂(x_t, t) ≈ E[x | x_t]: the one object that samplers, objectives, guidance and likelihoods see."""

from diffx.denoisers.autocast import Autocast
from diffx.denoisers.base import Denoiser
from diffx.denoisers.learned_variance import LearnedVariance
from diffx.denoisers.oracles import GaussianMixture
from diffx.denoisers.preconditioned import Preconditioned
from diffx.denoisers.rescheduled import Rescheduled

__all__ = ["Autocast", "Denoiser", "GaussianMixture", "LearnedVariance", "Preconditioned", "Rescheduled"]
