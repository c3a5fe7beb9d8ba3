"""DDPM's linear β, in continuous time."""

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class Linear(Schedule):
    r"""The linear schedule: variance preserving, with a rate β of noising linear in t.

    ᾱ(t) = exp(−β_min·t − (β_max − β_min)·t²/2), α = √ᾱ, σ = √(1 − ᾱ). The continuous form of DDPM's schedule (Ho et
    al., arXiv 2006.11239; Song et al., *Score-Based Generative Modeling through SDEs*, arXiv 2011.13456, Eq. 33). Use
    it when results are compared with DDPM or the VP SDE; the 1000-step table itself is schedule=ddpm.

    Arguments:
        beta_min: β at t = 0, ≥ 0.
        beta_max: β at t = 1, > beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__()
        self.beta_min = beta_min
        self.beta_max = beta_max

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = -(self.beta_min + (self.beta_max - self.beta_min) / 2 * t) * t
        # expm1 keeps σ exact where ᾱ is next to 1
        return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))

    def inverse(self, logsnr: Tensor) -> Tensor:
        minus_log_alpha_bar = torch.nn.functional.softplus(-logsnr)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * minus_log_alpha_bar)
        # the form without cancellation of the quadratic's solution
        return (2 * minus_log_alpha_bar / (self.beta_min + root)).clamp(max=1)
