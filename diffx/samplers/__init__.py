"""Samplers: solvers that turn a denoiser into samples. They need only x̂, α and σ, and hold no model."""

from diffx.samplers.base import Noise, Sampler
from diffx.samplers.ddim import DDIM
from diffx.samplers.ddpm import DDPM
from diffx.samplers.dpmpp_2m import DPMSolverPP2M
from diffx.samplers.euler import Euler
from diffx.samplers.heun import Heun

__all__ = ["DDIM", "DDPM", "DPMSolverPP2M", "Euler", "Heun", "Noise", "Sampler"]
