"""The sigmoid schedule."""

import math

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class Sigmoid(Schedule):
    r"""The sigmoid schedule: variance preserving, with the signal falling along a logistic curve.

    With S(u) = 1/(1 + e^{−u/τ}) and u(t) = start + (end − start)·t: ᾱ(t) = (S(end) − S(u))/(S(end) − S(start)), raised
    at its end as `Cosine` is, to `alpha_bar_min`. Jabri et al., *Scalable Adaptive Computation for Iterative
    Generation* (arXiv 2212.11972); the clipped form with these defaults is Chen, *On the Importance of Noise
    Scheduling* (arXiv 2301.10972), Alg. 1. Use it when images are large: less time is spent next to clean data than
    on the cosine schedule.

    Arguments:
        start: where on the curve t = 0 lies.
        end: where t = 1 lies, > start.
        tau: τ > 0; larger values come closer to a straight line.
        alpha_bar_min: ᾱ(1), in (0, 1).
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, alpha_bar_min: float = 1e-9) -> None:
        super().__init__()
        self.start = start
        self.end = end
        self.tau = tau
        self.alpha_bar_min = alpha_bar_min

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        half = (self.end - self.start) / (2 * self.tau)
        first, last = self.start / (2 * self.tau), self.end / (2 * self.tau)
        # S(a) − S(b) = sinh((a − b)/2τ)/(2·cosh(a/2τ)·cosh(b/2τ)): no cancellation at either end
        scale = math.sinh(half) * torch.cosh(first + half * t)
        noise = torch.sinh(half * t) * math.cosh(last) / scale
        signal = torch.sinh(half * (1 - t)) * math.cosh(first) / scale
        kept = 1 - self.alpha_bar_min
        return torch.sqrt(self.alpha_bar_min + kept * signal), torch.sqrt(kept * noise)
