"""EDM's density of training noise levels."""

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class LogNormal(TimeSampler):
    r"""Noise levels log-normal in σ/α, on any schedule; levels beyond its range go to its end.

    log(σ/α) ~ N(P_mean, P_std²). Karras et al. (arXiv 2206.00364), Table 1 and Sec. 5. On the flow schedule it equals
    `LogitNormal`.

    Use it when training shall go where images are decided, with EDM's weighting and preconditioning.

    Arguments:
        P_mean: mean of log(σ/α).
        P_std: its standard deviation, > 0.
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2) -> None:
        self.P_mean = P_mean
        self.P_std = P_std

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        # in float64, then rounded: the last bit of a vectorised exp depends on a sample's place in the batch
        logsnr = -2 * (self.P_mean + self.P_std * keys.normal("time", dtype=torch.float64))
        with torch.no_grad():
            t = schedule.inverse(logsnr).float()
        return t, torch.ones_like(t)
