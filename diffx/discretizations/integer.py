"""Times of a discrete-time model."""

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule
from diffx.utils import DiffxError


class Integer(Discretization):
    """The multiples of 1/T nearest to K equal steps, at which a model of T discrete steps was trained.

    Ho et al. (arXiv 2006.11239) take all T = 1000 of them; with fewer this is the "trailing" spacing of Lin et al.
    (arXiv 2305.08891), which starts at the last step.

    Arguments:
        total: T, the number of discrete steps, ≥ 1.
    """

    def __init__(self, total: int = 1000) -> None:
        self.total = total

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        first, last = round(start * self.total), round(stop * self.total)
        if steps > first - last:
            raise DiffxError(
                f"sampler.steps={steps} is more than the {first - last} integer steps between t = {start:g} and "
                f"{stop:g}; take at most that many, or discretization=uniform"
            )
        return torch.linspace(first, last, steps + 1, dtype=torch.float64).round() / self.total
