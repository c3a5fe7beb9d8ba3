"""Steps of equal time."""

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule


class Uniform(Discretization):
    """t_k = start + k/K·(stop − start)."""

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        return torch.linspace(start, stop, steps + 1, dtype=torch.float64)
