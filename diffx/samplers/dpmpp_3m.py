"""DPM-Solver++ with three steps' memory."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, diffusion, sqrt, where
from diffx.samplers.dpmpp_2m import Memory
from diffx.samplers.phi import moments, weights
from diffx.schedules import NoiseLevel


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

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> tuple[Memory, ...]:
        return ()

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: tuple[Memory, ...],
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, tuple[Memory, ...]]:
        x_hat = denoiser(x_t, t.t, **cond)
        known = (Memory(x_hat, t.logsnr), *state)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, known[:2]
        ratio, variance = diffusion(t, s, self.eta)
        nodes = [(level.logsnr - t.logsnr) / (s.logsnr - t.logsnr) for level in known]
        of_past = weights(nodes, moments((1 + self.eta) * (s.logsnr - t.logsnr) / 2, len(nodes)))[1:]
        of_past = [where(s.sigma == 0, 0.0, s.alpha * w) for w in of_past]
        x_s = ratio * x_t + (s.alpha - ratio * t.alpha - sum(of_past)) * x_hat
        for w, level in zip(of_past, state, strict=True):
            x_s = x_s + w * level.x_hat
        if self.eta > 0:
            x_s = x_s + sqrt(variance) * noise()
        return x_s, known[:2]
