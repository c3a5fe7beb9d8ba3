"""DPM-Solver++ with three steps' memory."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, diffusion, sqrt, where
from diffx.samplers.phi import moments, weights
from diffx.schedules import NoiseLevel


class Memory(NamedTuple):
    """The coefficients of the steps to come, of x_t, the estimates and the noise; and the two estimates before.

    The estimates are `[B, *]`, the last one first.
    """

    plan: list[list[Any]]
    past: tuple[Tensor, ...]


class DPMSolverPP3M(Sampler):
    r"""DPM-Solver++(3M), a parabola through the estimates of two steps before, on the ODE or the SDE.

    x_s = (σ_s/σ_t)·e^{−ηh}·x_t + α_s·∫ (1+η)·e^{(1+η)(λ−λ_s)}·P(λ) dλ + σ_s·√(1 − e^{−2ηh})·z, with P the parabola in
    λ = logSNR/2 and h = λ_s − λ_t. The multistep family of Lu et al., *DPM-Solver++* (arXiv 2211.01095). The
    third-order multisteps of k-diffusion (`dpmpp_3m_sde`) and diffusers take half of P's curvature: their D_2 is
    h²·P″/2 where the integral asks for h²·P″. The first two steps know less and are of lower order; the very first
    leaves an error of O(h²). A step to the clean end is x̂ itself. Use it when 20 to 50 evaluations of an unguided model
    are spent; η = 1 when noise shall mend the model's errors.

    Arguments:
        eta: η ≥ 0; 0 is deterministic.
    """

    order = 2

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Memory:
        steps = enumerate(pairwise(levels))
        return Memory([self._coefficients(t, s, levels[max(0, k - 2) : k][::-1]) for k, (t, s) in steps], ())

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Memory,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Memory]:
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        known = (x_hat, *state.past)
        memory = Memory(state.plan[1:], known[:2])
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, memory
        parts = (x_t, *known) if self.eta == 0 else (x_t, *known, noise())
        return combined(*zip(state.plan[0], parts, strict=True)), memory

    def _coefficients(self, t: NoiseLevel, s: NoiseLevel, past: list[NoiseLevel]) -> list[Any]:
        """Of x_t, of x̂ now and in the past, and of the noise if any, for one step."""
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return []  # x̂ itself
        ratio, variance = diffusion(t, s, self.eta)
        nodes = [(level.logsnr - t.logsnr) / (s.logsnr - t.logsnr) for level in (t, *past)]
        of_past = weights(nodes, moments((1 + self.eta) * (s.logsnr - t.logsnr) / 2, len(nodes)))[1:]
        of_past = [where(s.sigma == 0, 0.0, s.alpha * w) for w in of_past]
        of_noise = [sqrt(variance)] if self.eta > 0 else []
        return [ratio, s.alpha - ratio * t.alpha - sum(of_past), *of_past, *of_noise]
