"""Stable Diffusion 3's density with heavy tails."""

import math

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import DiffxError, Keys


class Mode(TimeSampler):
    r"""Times with more weight in the middle (s > 0) or at the ends (s < 0), and some everywhere.

    t = 1 − u − s·(cos²(πu/2) − 1 + u) with u ~ U(0, 1); s = 0 is uniform. Esser et al. (arXiv 2403.03206), Eq. 20.

    Use it when the logit-normal density's vanishing at both ends is suspected of harm.

    Arguments:
        scale: s, in [−1, 2/(π − 2)], within which t is monotone in u.

    Raises:
        DiffxError: for another scale.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise DiffxError(
                f"time_sampler.scale={scale:g} makes no density of times; choose it in [-1, {2 / (math.pi - 2):.2f}]"
            )
        self.scale = scale

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        # Eq. 20 at 1 − u, which is uniform too, so that nothing cancels at small t
        u = keys.uniform("time", dtype=torch.float64)
        t = (u + self.scale * (u - torch.sin(math.pi / 2 * u) ** 2)).float()
        return t, torch.ones_like(t)
