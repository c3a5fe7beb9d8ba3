"""Times of a discrete-time model, spaced in the three ways that diffusers names."""

import torch
from torch import Tensor

from diffx.discretizations.base import Discretization
from diffx.schedules import Schedule
from diffx.utils import DiffxError


class Integer(Discretization):
    """Steps of a model of T discrete ones, "trailing": counted back from the noisiest.

    The multiples of 1/T nearest to K equal steps. Ho et al. (arXiv 2006.11239) take all T = 1000 of them; with fewer
    this is the "trailing" spacing of Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed* (arXiv
    2305.08891), Sec. 3.3, which starts at the last step.

    Use it when a model was trained on discrete steps only, and sampling shall start where its noise is.

    Arguments:
        total: T, the number of discrete steps, ≥ 1.
    """

    def __init__(self, total: int = 1000) -> None:
        self.total = total

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        first, last = _range(self.total, steps, start, stop)
        return torch.linspace(first, last, steps + 1, dtype=torch.float64).round() / self.total


class Leading(Discretization):
    """Steps of a model of T discrete ones, "leading": counted up from the cleanest, short of the noisiest.

    t_k = (1 + offset + k·⌊T/K⌋)/T for k = K − 1, …, 0, then the end: DDIM's linear spacing (Song et al., arXiv
    2010.02502, App. D.2). It starts at t ≈ 1 − 1/K, below the largest noise level, which Lin et al. (arXiv 2305.08891)
    call a flaw. A part of the grid that starts below 1 starts there exactly.

    Use it when samples of a model released with this spacing are to be repeated.

    Arguments:
        total: T, the number of discrete steps, ≥ 1.
        offset: added to every step, ≥ 0; Stable Diffusion takes 1.
    """

    def __init__(self, total: int = 1000, offset: int = 0) -> None:
        self.total = total
        self.offset = offset

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        first, last = _range(self.total, steps, start, stop)
        k = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        # an offset may not lead beyond the first step, of which a full grid has none to spare
        offset = min(self.offset, first - last - 1 - (steps - 1) * ((first - last) // steps))
        times = (last + 1 + offset + k * ((first - last) // steps)) / self.total
        if start < 1:
            times[0] = start
        return torch.cat([times, times.new_full((1,), stop)])


class Linspace(Discretization):
    """Steps of a model of T discrete ones, equally spaced from the noisiest to the cleanest, both included.

    The K multiples of 1/T nearest to equal steps from 1 to 1/T, then the end. The last step, from 1/T, does next to
    nothing. Lin et al. (arXiv 2305.08891), Sec. 3.3, table 2. One step starts at the noisiest.

    Use it when samples of a model released with this spacing are to be repeated.

    Arguments:
        total: T, the number of discrete steps, ≥ 1.
    """

    def __init__(self, total: int = 1000) -> None:
        self.total = total

    def __call__(self, schedule: Schedule, steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        first, last = _range(self.total, steps, start, stop)
        # upwards from 0, so that halves are rounded as in numpy.linspace(0, T − 1, K)
        index = torch.linspace(last, first - 1, steps, dtype=torch.float64).round().flip(0)
        times = (index + 1) / self.total
        times[0] = first / self.total
        return torch.cat([times, times.new_full((1,), stop)])


def _range(total: int, steps: int, start: float, stop: float) -> tuple[int, int]:
    """The integer steps nearest to both ends.

    Raises:
        DiffxError: if there are fewer between them than asked for.
    """
    first, last = round(start * total), round(stop * total)
    if steps > first - last:
        raise DiffxError(
            f"sampler.steps={steps} is more than the {first - last} integer steps between t = {start:g} and "
            f"{stop:g}; take at most that many, or discretization=uniform"
        )
    return first, last
