"""DPM-Solver-3."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, is_pure_noise, rho, where
from diffx.samplers.between import between
from diffx.samplers.phi import phi
from diffx.schedules import NoiseLevel


class DPMSolver3(Sampler):
    r"""DPM-Solver-3, of third order in the noise estimate, in single steps.

    x_s = (α_s/α_t)·x_t − σ_s·h·(φ_1(h)·ε̂ + φ_2(h)/r_2·(ε̂_2 − ε̂)), h = λ_s − λ_t, λ = log(α/σ), with estimates at the
    shares r_1 and r_2 of the way. Lu et al., *DPM-Solver* (arXiv 2206.00927), Alg. 2, written in x̂. A step from pure
    noise (α = 0), where ε̂ says nothing, is of first order; one to the clean end is x̂ itself. Use it when errors shall
    be small and evaluations are many (60 and more).

    Arguments:
        r_1: where the second estimate is taken, in (0, r_2).
        r_2: where the third is, in (0, 1]; only 2/3 gives the third order.
    """

    order = 3
    evaluations = 3

    def __init__(self, r_1: float = 1 / 3, r_2: float = 2 / 3) -> None:
        self.r_1 = r_1
        self.r_2 = r_2

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> list[tuple[NoiseLevel, ...]]:
        return between(denoiser.schedule, levels, (self.r_1, self.r_2))

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: list[tuple[NoiseLevel, ...]],
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, list[tuple[NoiseLevel, ...]]]:
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        (m, n), rest = state[0], state[1:]
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, rest
        h, h_m, h_n = ((level.logsnr - t.logsnr) / 2 for level in (s, m, n))
        first_order = is_pure_noise(t)
        # ε̂_m − ε̂ = (x̂ − x̂_m)/ρ_m, and ε̂_n − ε̂ likewise but for what x̂_m has changed
        w_m = where(first_order, 0.0, n.sigma * h_n**2 / h_m * phi(2, h_n) / rho(m))
        w_n = where(first_order, 0.0, s.sigma * h**2 / h_n * phi(2, h))
        ratio_m, ratio_n, ratio = (level.sigma / t.sigma for level in (m, n, s))
        x_m = combined((ratio_m, x_t), (m.alpha - ratio_m * t.alpha, x_hat))
        x_hat_m = denoiser.at(m)(x_m, m.t, **cond)
        x_n = combined((ratio_n, x_t), (n.alpha - ratio_n * t.alpha - w_m, x_hat), (w_m, x_hat_m))
        x_hat_n = denoiser.at(n)(x_n, n.t, **cond)
        of_m, of_n = -w_n * w_m / n.sigma, w_n / rho(n)
        gain = s.alpha - ratio * t.alpha - of_m - of_n
        return combined((ratio, x_t), (gain, x_hat), (of_m, x_hat_m), (of_n, x_hat_n)), rest
