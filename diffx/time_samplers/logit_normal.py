"""Stable Diffusion 3's density of training times."""

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class LogitNormal(TimeSampler):
    r"""Times logit-normal on (0, 1): few at both ends.

    t = 1/(1 + e^{−u}) with u ~ N(m, s²). Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis* (arXiv 2403.03206), Eq. 19. On the flow schedule, where log(σ/α) = logit(t), it equals `LogNormal` with
    P_mean = m and P_std = s.

    Use it when flow matching shall spend less on the easy ends: the paper's best setting is m = 0, s = 1.

    Arguments:
        mean: m; larger means noisier.
        std: s > 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        t = torch.sigmoid(self.mean + self.std * keys.normal("time", dtype=torch.float64)).float()
        return t, torch.ones_like(t)
