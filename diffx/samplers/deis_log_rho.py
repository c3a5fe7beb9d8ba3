"""DEIS with polynomials in the logSNR."""

import math
from typing import Any

from diffx.samplers.adams_bashforth import AdamsBashforth
from diffx.samplers.base import rho
from diffx.samplers.phi import phi
from diffx.schedules import NoiseLevel, Schedule


class DEISLogRho(AdamsBashforth):
    r"""DEIS with the noise estimate a polynomial in the logSNR.

    `AdamsBashforth` with P a polynomial in log ρ = log(σ/α), the variable of diffusers' `DEISMultistepScheduler`; Zhang
    and Chen (arXiv 2204.13902), Eqs. 14 and 15. The integrals are φ-functions: ∫ u^i dρ = −ρ_s·h·i!·φ_{i+1}(h),
    h = log(ρ_t/ρ_s). Use it when the method shall not depend on the schedule's time.

    Arguments:
        order: p ∈ {1, 2, 3, 4}, the number of estimates.
    """

    def __init__(self, order: int = 3) -> None:
        super().__init__(order)

    def variable(self, level: NoiseLevel) -> Any:
        return level.logsnr

    def moments(self, schedule: Schedule, steps: list[tuple[NoiseLevel, NoiseLevel]]) -> list[list[Any]]:
        widths = [(s.logsnr - t.logsnr) / 2 for t, s in steps]
        return [
            [-rho(s) * h * math.factorial(i) * phi(i + 1, h) for i in range(self.estimates)]
            for h, (_, s) in zip(widths, steps, strict=True)
        ]
