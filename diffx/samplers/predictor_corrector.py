"""Langevin corrections between a solver's steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined, where
from diffx.samplers.ddpm import DDPM
from diffx.schedules import NoiseLevel

FIRST_DRAW = 64
"""The corrector's first noise within a step; those before it are the predictor's."""


class PredictorCorrector(Sampler):
    r"""A step of another sampler, then steps of Langevin dynamics at the noise level reached.

    M times x ← x + ε·score + √(2ε)·z with ε = 2·(r·‖z‖/‖score‖)². Song et al., *Score-Based Generative Modeling through
    SDEs* (arXiv 2011.13456), Algs. 2 to 5, but for the factor 1 − β_i of ε, which is next to 1; the norms are each
    sample's own, so that none depends on its batch, and ask for many dimensions (images have). The corrector's
    stationary distribution has a variance too large by a share of about r². There is no correction at the clean end.
    Use it when results of the SDE papers are to be reproduced.

    Arguments:
        predictor: the sampler of the steps, of one noise per step at most; ancestral sampling by default.
        r: the signal-to-noise ratio of a correction, > 0.
        corrections: M ≥ 1.
    """

    def __init__(self, predictor: Sampler | None = None, r: float = 0.16, corrections: int = 1) -> None:
        self.predictor = DDPM() if predictor is None else predictor
        self.r = r
        self.corrections = corrections
        self.order = min(self.predictor.order, 1)
        self.evaluations = None if self.predictor.evaluations is None else self.predictor.evaluations + corrections

    def init(self, denoiser: Denoiser, levels: list[NoiseLevel]) -> Any:
        return self.predictor.init(denoiser, levels)

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: Any,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, Any]:
        x_s, state = self.predictor.step(denoiser, x_t, t, s, state, noise=noise, **cond)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_s, state
        for draw in range(FIRST_DRAW, FIRST_DRAW + self.corrections):
            x_s = self._correct(x_s, denoiser.at(s)(x_s, s.t, **cond), s, noise(draw=draw))
        return x_s, state

    def _correct(self, x_s: Tensor, x_hat: Tensor, s: NoiseLevel, z: Tensor) -> Tensor:
        sigma = where(s.sigma == 0, 1.0, s.sigma)
        # −σ·score, of the scale of z: only the ratio of the norms counts
        eps = combined((1 / sigma, x_s), (-s.alpha / sigma, x_hat))
        step = self.r * (norm(z) / norm(eps).clamp_(min=1e-12))
        return x_s.addcmul(s.sigma * step, z, value=2).addcmul_(s.sigma * step**2, eps, value=-2)


def norm(x: Tensor) -> Tensor:
    """‖x‖ of each sample, `[B, 1, …, 1]`."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
