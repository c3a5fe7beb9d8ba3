"""Linear multistep in the noise level."""

from typing import Any

from diffx.samplers.adams_bashforth import AdamsBashforth
from diffx.samplers.base import rho
from diffx.schedules import NoiseLevel, Schedule


class LMS(AdamsBashforth):
    r"""Linear multistep: Adams and Bashforth's method in σ/α.

    `AdamsBashforth` with P a polynomial in ρ = σ/α: k-diffusion's `lms`, and the ρAB of Zhang and Chen, *Fast Sampling
    of Diffusion Models with Exponential Integrator* (arXiv 2204.13902). Use it when results that were sampled
    so are to be reproduced; `DEIS` is better at few steps.

    Arguments:
        order: p ∈ {1, 2, 3, 4}, the number of estimates.
    """

    def __init__(self, order: int = 4) -> None:
        super().__init__(order)

    def variable(self, level: NoiseLevel) -> Any:
        return rho(level)

    def moments(self, schedule: Schedule, steps: list[tuple[NoiseLevel, NoiseLevel]]) -> list[list[Any]]:
        return [[(rho(s) - rho(t)) / (i + 1) for i in range(self.estimates)] for t, s in steps]
