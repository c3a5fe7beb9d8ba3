"""Grids regular in a function of time."""

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule


class Uniform(Discretization):
    """Equal steps of time.

    t_k = start + k/K·(stop − start). Song et al. (arXiv 2011.13456); on the flow schedule the grid of rectified flow.

    Use it when steps are many, or the schedule was made to be sampled this way (flow, cosine, the VP SDE).
    """

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


class Quadratic(Discretization):
    r"""Equal steps of the square root of time.

    t_k = (√start + k/K·(√stop − √start))², short steps near the clean end. Song et al., *Denoising Diffusion Implicit
    Models* (arXiv 2010.02502), App. D.2: τ_i = ⌊c·i²⌋, here not rounded to integer steps.

    Use it when a model on DDPM's linear β is sampled in few steps: it is DDIM's choice for CIFAR-10.
    """

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        ends = torch.tensor([start, stop], dtype=torch.float64)
        root, last = ends.sqrt()
        times = torch.lerp(root, last, torch.linspace(0, 1, steps + 1, dtype=torch.float64)).square()
        return torch.cat([ends[:1], times[1:-1], ends[1:]])
