"""Beta sampling."""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule


class Beta(Discretization):
    r"""Quantiles of a Beta distribution over time: with shapes below 1, short steps at both ends.

    t_k = stop + (start − stop)·F⁻¹(1 − k/K), F the cumulative distribution of Beta(a, b). Lee et al., *Beta Sampling is
    All You Need* (arXiv 2407.12173); a = b = 1 is `Uniform`.

    Use it when both the coarse content (early steps) and the details (late ones) suffer from too few steps.

    Arguments:
        a: first shape, > 0; smaller puts more steps near the clean end.
        b: second shape, > 0; smaller puts more steps near the noisy end.
    """

    def __init__(self, a: float = 0.6, b: float = 0.6) -> None:
        self.a = a
        self.b = b

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        quantiles = torch.from_numpy(stats.beta.ppf(np.linspace(1, 0, steps + 1), self.a, self.b))
        times = stop + (start - stop) * quantiles
        times[0], times[-1] = start, stop
        return times
