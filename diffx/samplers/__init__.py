"""Samplers: solvers that turn a denoiser into samples. They need only x̂, α and σ, and hold no model."""

from diffx.samplers.adaptive import Adaptive
from diffx.samplers.base import Noise, Sampler
from diffx.samplers.counted import Counted
from diffx.samplers.ddim import DDIM
from diffx.samplers.ddpm import DDPM
from diffx.samplers.ddpm_learned import DDPMLearned
from diffx.samplers.deis import DEIS
from diffx.samplers.deis_log_rho import DEISLogRho
from diffx.samplers.dpm_solver_2 import DPMSolver2
from diffx.samplers.dpm_solver_3 import DPMSolver3
from diffx.samplers.dpmpp_2m import DPMSolverPP2M
from diffx.samplers.dpmpp_2s import DPMSolverPP2S
from diffx.samplers.dpmpp_3m import DPMSolverPP3M
from diffx.samplers.edm import EDMHeun
from diffx.samplers.euler import Euler
from diffx.samplers.euler_maruyama import EulerMaruyama
from diffx.samplers.heun import Heun
from diffx.samplers.lms import LMS
from diffx.samplers.pndm import PNDM
from diffx.samplers.predictor_corrector import PredictorCorrector
from diffx.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "LMS",
    "PNDM",
    "Adaptive",
    "Counted",
    "DDPMLearned",
    "DEISLogRho",
    "DPMSolver2",
    "DPMSolver3",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPP3M",
    "EDMHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Noise",
    "PredictorCorrector",
    "Sampler",
    "UniPC",
]
