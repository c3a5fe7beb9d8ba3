"""Factors of the learning rate as functions of the step."""

import math
from abc import ABC, abstractmethod


class LRSchedule(ABC):
    """A factor of the base learning rate, with a linear warm-up.

    Arguments:
        warmup_steps: steps over which the rate rises from 0, ≥ 0.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps

    @abstractmethod
    def decay(self, step: int) -> float:
        """The factor at a step ≥ 0, in [0, 1], without the warm-up."""

    def __call__(self, step: int) -> float:
        """The factor at a step ≥ 0, in [0, 1]; the first step of a warm-up is not 0."""
        return min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0) * self.decay(step)


class Constant(LRSchedule):
    """The base rate after the warm-up (Ho et al., arXiv 2006.11239, App. B)."""

    def decay(self, step: int) -> float:
        return 1.0


class Linear(LRSchedule):
    """Falls linearly to 0 at `total_steps`.

    Arguments:
        total_steps: the step at which the rate is 0, ≥ 1.
        warmup_steps: as `LRSchedule`.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.total_steps = total_steps

    def decay(self, step: int) -> float:
        return max(0.0, 1 - step / self.total_steps)


class Cosine(LRSchedule):
    """Falls to 0 at `total_steps` along half a cosine (Loshchilov and Hutter, arXiv 1608.03983, Eq. 5).

    Arguments:
        total_steps: the step at which the rate is 0, ≥ 1.
        warmup_steps: as `LRSchedule`.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.total_steps = total_steps

    def decay(self, step: int) -> float:
        return (1 + math.cos(math.pi * min(1.0, step / self.total_steps))) / 2


class InverseSqrt(LRSchedule):
    """1/√max(step/t_ref, 1) (Karras et al., EDM2, arXiv 2312.02696, Eq. 67).

    Arguments:
        t_ref: the step from which the rate falls, ≥ 1.
        warmup_steps: as `LRSchedule`.
    """

    def __init__(self, t_ref: int = 70000, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.t_ref = t_ref

    def decay(self, step: int) -> float:
        return 1 / math.sqrt(max(step / self.t_ref, 1))
