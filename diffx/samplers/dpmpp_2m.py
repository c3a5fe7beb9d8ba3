"""DPM-Solver++ with two steps' memory."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, where
from diffx.schedules import NoiseLevel


class Memory(NamedTuple):
    """The previous step's estimate x̂ `[B, *]` and its logSNR."""

    x_hat: Tensor
    logsnr: float | Tensor


class DPMSolverPP2M(Sampler):
    r"""x_s = (σ_s/σ_t)·x_t + α_s·(1 − e^{−h})·D, with D = x̂ + (h/2h₋)·(x̂ − x̂₋).

    λ = logSNR/2, h = λ_s − λ_t, and ₋ marks the step before. Lu et al., *DPM-Solver++* (arXiv 2211.01095), Alg. 2. The
    first step, and a last step to the clean end, where h is infinite, are of first order (D = x̂).
    """

    order = 2

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
        x_hat = denoiser(x_t, t.t, **cond)
        # α_s·(1 − e^{−h}), without the exponential
        gain = s.alpha - s.sigma * t.alpha / t.sigma
        x_s = s.sigma / t.sigma * x_t + gain * x_hat
        if state is not None:
            r = where(s.sigma == 0, 0.0, (s.logsnr - t.logsnr) / (t.logsnr - state.logsnr) / 2)
            x_s = x_s + gain * r * (x_hat - state.x_hat)
        return x_s, Memory(x_hat, t.logsnr)
