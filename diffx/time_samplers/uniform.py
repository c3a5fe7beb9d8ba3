"""Times uniform in t."""

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class Uniform(TimeSampler):
    """t ~ U(t_min, 1), independent (Ho et al., arXiv 2006.11239, Alg. 1).

    Arguments:
        t_min: the smallest time, in [0, 1). Score SDE (arXiv 2011.13456, App. C) stops at 10⁻⁵, where σ is still told
            from 0.
    """

    def __init__(self, t_min: float = 1e-5) -> None:
        self.t_min = t_min

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        u = keys.uniform("time")
        return self.t_min + (1 - self.t_min) * u, torch.ones_like(u)


class Stratified(TimeSampler):
    """t ~ U(t_min, 1), one per stratum: sample k of a global batch of B falls into the k-th of B equal cells.

    Each time is uniform over its cell, so that the batch's mean loss is unbiased and varies less. The cells are those
    of the global batch, whatever the number of ranks.

    Arguments:
        t_min: the smallest time, in [0, 1).
    """

    def __init__(self, t_min: float = 1e-5) -> None:
        self.t_min = t_min

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        u = (keys.index % keys.total + keys.uniform("time")) / keys.total
        return self.t_min + (1 - self.t_min) * u, torch.ones_like(u)
