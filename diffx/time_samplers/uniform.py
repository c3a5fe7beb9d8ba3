"""Times uniform in t."""

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class Uniform(TimeSampler):
    """Times uniform in t, independent of each other.

    t ~ U(t_min, 1). Ho et al. (arXiv 2006.11239), Alg. 1. Score SDE (arXiv 2011.13456, App. C) stops at 10⁻⁵, where σ
    is still told from 0.

    Use it when a paper's training is to be repeated to the letter; `Stratified` has the same mean and less noise.

    Arguments:
        t_min: the smallest time, in [0, 1).
    """

    def __init__(self, t_min: float = 1e-5) -> None:
        self.t_min = t_min

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        u = keys.uniform("time")
        return self.t_min + (1 - self.t_min) * u, torch.ones_like(u)


class Stratified(TimeSampler):
    """Times uniform in t, one per stratum: sample k of a global batch of B falls into the k-th of B equal cells.

    t = t_min + (1 − t_min)·(k + u_k)/B. Each time is uniform over its cell, so that the batch's mean loss is unbiased
    and varies less. The cells are those of the global batch, whatever the number of ranks.

    Use it when times shall be uniform, unless a paper's independent ones are to be repeated.

    Arguments:
        t_min: the smallest time, in [0, 1).
    """

    def __init__(self, t_min: float = 1e-5) -> None:
        self.t_min = t_min

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        u = (keys.index % keys.total + keys.uniform("time")) / keys.total
        return self.t_min + (1 - self.t_min) * u, torch.ones_like(u)
