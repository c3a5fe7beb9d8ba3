"""Score prediction."""

import torch
from torch import Tensor

from diffx.parameterizations.base import Parameterization


class Score(Parameterization):
    r"""The network predicts the score.

    F = ∇ log p(x_t): x̂ = (x_t + σ²·F)/α, Tweedie's formula; Song et al., *Score-Based Generative Modeling through
    SDEs* (arXiv 2011.13456), Eq. 7. The target −z/σ is unbounded where σ → 0: weight it (weighting=snr), where `unit`
    would look at the clean end alone. Undefined where α = 0. Use it when a network is compared with those that predict
    the score itself; `Eps` is the same up to the factor −σ, and better conditioned.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.rsqrt(alpha**2 + sigma**2), 1 / alpha, sigma**2 / alpha
