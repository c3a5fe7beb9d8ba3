"""Time grids apart from solvers."""

from abc import ABC, abstractmethod

from torch import Tensor

from diffx.schedules import Schedule


class Discretization(ABC):
    """A time grid for any schedule and number of steps."""

    @abstractmethod
    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """The grid.

        Arguments:
            schedule: the schedule on which is sampled.
            steps: K ≥ 1, the number of steps.
            start: the first time, in (0, 1].
            stop: the last time, in [0, start).

        Returns:
            K + 1 strictly decreasing times, float64 `[K + 1]`, from `start` (or the largest noise level the grid is
            defined for) to `stop`.
        """
