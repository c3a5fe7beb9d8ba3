"""Stable Diffusion 3's CosMap."""

import math

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class CosineMap(TimeSampler):
    r"""Times under which the flow schedule sees the noise levels of a cosine schedule under uniform ones.

    t = 1 − 1/(tan(πu/2) + 1) with u ~ U(0, 1), of density 2/(π − 2πt + 2πt²). Esser et al. (arXiv 2403.03206), Eq. 21:
    there log(σ/α) = log tan(πu/2), as for α = cos(πu/2), σ = sin(πu/2).

    Use it when flow matching is compared with a cosine-schedule model at equal noise levels.
    """

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * keys.uniform("time", dtype=torch.float64)
        t = (angle.sin() / (angle.sin() + angle.cos())).float()
        return t, torch.ones_like(t)
