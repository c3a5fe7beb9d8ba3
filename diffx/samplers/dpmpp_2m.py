"""DPM-Solver++ with two steps' memory."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, diffusion, sqrt, where
from diffx.schedules import NoiseLevel


class Memory(NamedTuple):
    """The previous step's estimate x̂ `[B, *]` and its logSNR."""

    x_hat: Tensor
    logsnr: float | Tensor


class DPMSolverPP2M(Sampler):
    r"""DPM-Solver++(2M), of second order through the estimate of the step before, on the ODE or the SDE.

    x_s = (σ_s/σ_t)·e^{−ηh}·x_t + α_s·(1 − e^{−(1+η)h})·D + σ_s·√(1 − e^{−2ηh})·z, with D = x̂ + (h/2h₋)·(x̂ − x̂₋),
    λ = logSNR/2, h = λ_s − λ_t, and ₋ the step before. Lu et al., *DPM-Solver++* (arXiv 2211.01095), Alg. 2 with η = 0,
    SDE-DPM-Solver++(2M) with η = 1; between them as in k-diffusion. The first step, and a last step to the clean end,
    where h is infinite, are of first order (D = x̂). Use it when samples shall be good in about 20 evaluations, guided
    or not; η = 1 when noise shall mend the model's errors, at more evaluations.

    Arguments:
        eta: η ≥ 0; 0 is deterministic.
    """

    order = 2

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Memory | None,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Memory]:
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        ratio, variance = diffusion(t, s, self.eta)
        gain = s.alpha - ratio * t.alpha
        terms = [(ratio, x_t), (gain, x_hat)]
        if state is not None:
            r = where(s.sigma == 0, 0.0, (s.logsnr - t.logsnr) / (t.logsnr - state.logsnr) / 2)
            terms = [(ratio, x_t), (gain * (1 + r), x_hat), (-gain * r, state.x_hat)]
        if self.eta > 0 and (isinstance(s.sigma, Tensor) or s.sigma > 0):
            terms.append((sqrt(variance), noise()))
        return combined(*terms), Memory(x_hat, t.logsnr)
