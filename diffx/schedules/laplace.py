"""The Laplace schedule."""

import math

import torch
from torch import Tensor

from diffx.schedules.base import Schedule


class Laplace(Schedule):
    r"""The Laplace schedule: variance preserving, with most of the time spent around one noise level.

    Where t is uniform, logSNR has Laplace's law: logSNR(t) = μ − b·sgn(½ − t)·log(1 − 2·|t − ½|), the law's quantile
    function. Hang et al., *Improved Noise Schedule for Diffusion Training* (arXiv 2407.03297), Table 1. The law is cut
    at `logsnr_min`, so that ε-prediction stays defined at t = 1; its clean tail is whole. Use it when training time
    shall go to the middle noise levels, and sample on another schedule, or on a grid of logSNR: in t its slopes at the
    ends are steep.

    Arguments:
        mu: μ, the logSNR trained most.
        b: the law's scale, > 0.
        logsnr_min: the logSNR at t = 1, < mu.
    """

    def __init__(self, mu: float = 0.0, b: float = 0.5, logsnr_min: float = -10.0) -> None:
        super().__init__()
        self.mu = mu
        self.b = b
        self.logsnr_min = logsnr_min

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        cut = 0.5 * math.exp((self.logsnr_min - self.mu) / self.b)
        # the probabilities of less and of more noise, each without cancellation
        less, more = (1 - cut) * t, (1 - t) + cut * t
        tail = torch.log(2 * torch.minimum(less, more))
        value = self.mu + self.b * torch.where(less < more, -tail, tail)
        return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()

    def inverse(self, logsnr: Tensor) -> Tensor:
        cut = 0.5 * math.exp((self.logsnr_min - self.mu) / self.b)
        u = (logsnr - self.mu) / self.b
        tail = 0.5 * torch.exp(-u.abs())
        return (torch.where(u > 0, tail, 1 - tail) / (1 - cut)).clamp(max=1)
