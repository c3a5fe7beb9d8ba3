"""DPM-Solver-2."""

from typing import Any

from diffx.samplers.base import is_pure_noise, where
from diffx.samplers.phi import exp
from diffx.samplers.two_stage import TwoStage
from diffx.schedules import NoiseLevel


class DPMSolver2(TwoStage):
    r"""DPM-Solver-2, of second order in the noise estimate, with ancestral noise if wanted.

    `TwoStage` with w = e^{λ_m − λ_t}/(2r), λ = log(α/σ). Lu et al., *DPM-Solver* (arXiv 2206.00927), Alg. 1, for any r
    and written in x̂. With r = 1/2 it is the midpoint rule of ε̂ = dy/dρ in y = x/α and ρ = σ/α, k-diffusion's `dpm_2`,
    with η = 1 its `dpm_2_ancestral`; with r = 1 it is EDM's Heun. From pure noise (α = 0), where ρ is infinite,
    w = 1/(2r). Use it when an unguided model is sampled in 20 to 50 evaluations; η = 1 when noise shall mend errors.

    Arguments:
        r: where the second estimate is taken, in (0, 1].
        eta: η ∈ [0, 1], the share of ancestral noise.
    """

    def weight(self, t: NoiseLevel, m: NoiseLevel, r: Any) -> Any:
        grown = where(is_pure_noise(t), 0.0, (m.logsnr - t.logsnr) / 2)
        return exp(grown) / (2 * r)
