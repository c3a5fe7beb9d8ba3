"""UniPC."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, is_pure_noise, where
from diffx.samplers.phi import moments, weights
from diffx.schedules import NoiseLevel
from diffx.utils import DiffxError


class Step(NamedTuple):
    """The coefficients of x_t, x̂_t and further estimates in the integral of a step: predicting, and corrected."""

    predictor: list[Any]
    corrector: list[Any]


class Memory(NamedTuple):
    """The steps to come; of the step before, its corrected samples `[B, *]` and how it is corrected; the estimates.

    The estimates are those known, `[B, *]`, the last one first.
    """

    plan: list[Step]
    x: Tensor | None
    corrector: list[Any]
    past: tuple[Tensor, ...]


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

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Memory:
        plan = []
        for k, (t, s) in enumerate(pairwise(levels)):
            if not isinstance(s.sigma, Tensor) and s.sigma == 0:
                plan.append(Step([], []))  # x̂ itself
                continue
            past = levels[max(0, k + 1 - self.estimates) : k][::-1]
            # as many estimates as the prediction had, and the one at its end
            plan.append(Step(self._coefficients(t, s, past), self._coefficients(t, s, [*past, s])))
        return Memory(plan, None, [], ())

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
        (predictor, corrector), rest = state.plan[0], state.plan[1:]
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, Memory(rest, x_t, corrector, (x_hat,))
        if state.x is not None:
            x_t = combined(*zip(state.corrector, (state.x, *state.past, x_hat), strict=True))
        known = (x_hat, *state.past)[: self.estimates]
        x_s = combined(*zip(predictor, (x_t, *known), strict=True))
        return x_s, Memory(rest, x_t, corrector, known)

    def _coefficients(self, t: NoiseLevel, s: NoiseLevel, others: Sequence[NoiseLevel]) -> list[Any]:
        """Those of a step from t to s by the polynomial through the estimates at t and at other levels."""
        h = (s.logsnr - t.logsnr) / 2
        nodes = [(level.logsnr - t.logsnr) / (s.logsnr - t.logsnr) for level in others]
        if len(nodes) == 1:
            of_others = [self._b(t, h) / 2 / nodes[0]]
        else:
            of_others = weights([0.0, *nodes], moments(h, len(nodes) + 1))[1:]
        scaled = [where(s.sigma == 0, 0.0, s.alpha * w) for w in of_others]
        ratio = s.sigma / t.sigma
        return [ratio, s.alpha - ratio * t.alpha - sum(scaled), *scaled]

    def _b(self, t: NoiseLevel, h: Any) -> Any:
        # from pure noise h is infinite, and B_1 no weight
        return where(is_pure_noise(t) | (self.b == 2), moments(h, 1)[0], h)
