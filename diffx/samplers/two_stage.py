"""One more estimate on the way."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, ancestral, combined, sqrt, where
from diffx.samplers.between import between
from diffx.schedules import NoiseLevel


class TwoStage(Sampler):
    r"""A step with one more estimate on its way.

    x_s = (σ_d/σ_t)·x_t + gain·(x̂ + w·(x̂_m − x̂)) + η·σ̃·z, with x̂_m at a level m at the share r of the way in logSNR,
    reached by a first-order step. σ_d = √(σ_s² − η²·σ̃²) is the noise level stepped down to before η·σ̃·z leads up to σ_s
    (σ̃ as in `DDIM`), and gain = α_s − α_t·σ_d/σ_t. The noise that is added is exact, so that the marginals keep the
    order of the deterministic step. A step to the clean end is x̂ itself.
    """

    order = 2
    evaluations = 2

    def __init__(self, r: float = 0.5, eta: float = 0.0) -> None:
        self.r = r
        self.eta = eta

    @abstractmethod
    def weight(self, t: NoiseLevel, m: NoiseLevel, r: Any) -> Any:
        """w, for a step from t with an estimate at m, at the share r of the way."""

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> list[tuple[NoiseLevel, ...]]:
        return between(denoiser.schedule, levels, (self.r,), self.eta)

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
        (m,), rest = state[0], state[1:]
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, rest
        ratio, variance, logsnr = ancestral(t, s, self.eta)
        gain = s.alpha - ratio * t.alpha
        w = gain * self.weight(t, m, (m.logsnr - t.logsnr) / (logsnr - t.logsnr))
        w = where(s.sigma == 0, 0.0, w)
        ratio_m = m.sigma / t.sigma
        x_m = combined((ratio_m, x_t), (m.alpha - ratio_m * t.alpha, x_hat))
        terms = [(ratio, x_t), (gain - w, x_hat), (w, denoiser.at(m)(x_m, m.t, **cond))]
        if self.eta > 0:
            terms.append((sqrt(variance), noise()))
        return combined(*terms), rest
