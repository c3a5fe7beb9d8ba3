"""DPM-Solver++ in single steps."""

from typing import Any

from diffx.samplers.two_stage import TwoStage
from diffx.schedules import NoiseLevel


class DPMSolverPP2S(TwoStage):
    r"""DPM-Solver++(2S), of second order in x̂, with ancestral noise if wanted.

    `TwoStage` with w = 1/(2r). Lu et al., *DPM-Solver++* (arXiv 2211.01095), Alg. 1; with η = 1 k-diffusion's
    `dpmpp_2s_ancestral`. Use it when the guidance scale is large and the steps are few, where estimates kept from steps
    before (`DPMSolverPP2M`) mislead.

    Arguments:
        r: where the second estimate is taken, in (0, 1].
        eta: η ∈ [0, 1], the share of ancestral noise.
    """

    def weight(self, t: NoiseLevel, m: NoiseLevel, r: Any) -> Any:
        return 1 / (2 * r)
