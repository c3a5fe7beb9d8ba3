"""VDM's low-discrepancy times."""

import torch
from torch import Tensor

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.utils import Keys


class LowDiscrepancy(TimeSampler):
    r"""Times equally spaced over the global batch, with one random offset for all of it.

    u_k = (u_0 + k/B) mod 1 and t = t_min + (1 − t_min)·u_k, for sample k of a global batch of B on any number of ranks.
    Each time is uniform on (t_min, 1), so that the mean loss is unbiased. Kingma et al., *Variational Diffusion Models*
    (arXiv 2107.00630), App. I.1.

    Use it when the variational bound is trained or estimated; `Stratified` spreads the times as well, with an
    independent number for each.

    Arguments:
        t_min: the smallest time, in [0, 1).
    """

    def __init__(self, t_min: float = 1e-5) -> None:
        self.t_min = t_min

    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        batch = Keys(keys.seed, keys.index // keys.total, keys.step)
        offset = batch.uniform("time/offset", dtype=torch.float64)
        u = (offset + (keys.index % keys.total) / keys.total) % 1
        t = (self.t_min + (1 - self.t_min) * u).float()
        return t, torch.ones_like(t)
