"""UniPC."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, is_pure_noise, where
from diffx.samplers.phi import moments, weights
from diffx.schedules import NoiseLevel
from diffx.utils import DiffxError


class Known(NamedTuple):
    """A noise level of the past and the estimate x̂ `[B, *]` there."""

    level: NoiseLevel
    x_hat: Tensor


class Memory(NamedTuple):
    """The corrected samples of the step before, `[B, *]`, and the estimates known, the last one first."""

    x: Tensor
    past: tuple[Known, ...]


class UniPC(Sampler):
    r"""UniPC, a predictor and a corrector on x̂ at one denoiser call per step.

    x_s = (σ_s/σ_t)·x_t + α_s·∫ e^{λ−λ_s}·P(λ) dλ, λ = log(α/σ). The predictor's P is the polynomial through x̂ now and
    in p − 1 steps before; the corrector's goes through x̂ at the prediction too, which is the next step's estimate and
    not taken again. Zhao et al., *UniPC* (arXiv 2302.04867), Algs. 1 and 2 for data prediction. B(h) matters only where
    P is a straight line, as the paper's weight is B(h)/2 then instead of the integral: B_1 = h or B_2 = e^h − 1, which
    for x̂ reads 1 − e^{−h}. Orders rise from 1 in the first steps, which is an error of O(h³) if p = 3. A step to the
    clean end is x̂ itself. Use it when samples shall cost 5 to 15 evaluations: p = 3 unguided, p = 2 guided.

    Arguments:
        order: p ∈ {1, 2, 3}.
        b: 1 or 2, which B(h); the paper takes 2 but for few steps of unguided pixels.
    """

    def __init__(self, order: int = 3, b: int = 2) -> None:
        if order < 1 or b not in (1, 2):
            raise DiffxError(
                f"UniPC has no sampler.order={order} with sampler.b={b}; take order 1, 2 or 3 and b 1 or 2"
            )
        self.estimates = order
        self.b = b
        self.order = min(order + 1, 3)

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
        here = Known(t, denoiser(x_t, t.t, **cond))
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return here.x_hat, Memory(x_t, (here,))
        past: tuple[Known, ...] = ()
        if state is not None:
            past = state.past
            # as many estimates as the prediction had, and the one at its end
            x_t = self._integrate(state.x, past[0], t, (*past[1 : self.estimates], here))
        past = (here, *past)[: self.estimates]
        return self._integrate(x_t, here, s, past[1:]), Memory(x_t, past)

    def _integrate(self, x: Tensor, start: Known, s: NoiseLevel, others: tuple[Known, ...]) -> Tensor:
        """From x at a level with an estimate to s, by the polynomial through that and other estimates."""
        t = start.level
        h = (s.logsnr - t.logsnr) / 2
        nodes = [(known.level.logsnr - t.logsnr) / (s.logsnr - t.logsnr) for known in others]
        if len(nodes) == 1:
            of_others = [self._b(t, h) / 2 / nodes[0]]
        else:
            of_others = weights([0.0, *nodes], moments(h, len(nodes) + 1))[1:]
        scaled = [where(s.sigma == 0, 0.0, s.alpha * w) for w in of_others]
        ratio = s.sigma / t.sigma
        x_s = ratio * x + (s.alpha - ratio * t.alpha - sum(scaled)) * start.x_hat
        for w, known in zip(scaled, others, strict=True):
            x_s = x_s + w * known.x_hat
        return x_s

    def _b(self, t: NoiseLevel, h: Any) -> Any:
        # from pure noise h is infinite, and B_1 no weight
        return where(is_pure_noise(t) | (self.b == 2), moments(h, 1)[0], h)
