"""Where on the way from noise to data a guide is asked."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import DiffxError

Rows = slice | Tensor
"""Which samples of a batch: all of them, or those at the positions int64 `[n]`."""


class Interval:
    r"""The noise levels low < σ/α ≤ high.

    Kynkäänniemi et al., *Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models* (arXiv 2404.07724), Eq. 6: the guidance scale is a function of σ that is 1 outside (σ_lo, σ_hi]. Their σ is
    that of a schedule with α = 1, which on any other schedule is σ/α.

    Use it when guidance costs variety: at high noise it decides for a few modes, at low noise it changes nothing and
    costs a network evaluation.

    Arguments:
        bounds: low and high, 0 ≤ low < high, in units of the data (pixels in [−1, 1]); None is everywhere.

    Raises:
        DiffxError: if the bounds are not two such numbers.
    """

    def __init__(self, bounds: Sequence[float] | None = None) -> None:
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
            raise DiffxError(
                f"guidance.interval is {list(bounds)}; give the lowest and the highest sigma/alpha at which to guide, "
                "such as [0.2, 3], or null"
            )
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))

    def __contains__(self, level: NoiseLevel) -> bool:
        """Whether a noise level of numbers is within; decided on the host."""
        return self.bounds is None or self.bounds[0] < math.exp(-level.logsnr / 2) <= self.bounds[1]

    def rows(self, schedule: Schedule, t: Tensor) -> Rows | None:
        """The samples that are within, for which a GPU is waited for; samplers ask by `Denoiser.at` instead.

        Arguments:
            schedule: the forward process.
            t: their times, `[]` or `[B]`.

        Returns:
            Which samples are to be guided; None for none of them.
        """
        if self.bounds is None:
            return slice(None)  # without a look at t, for which a GPU would have to be waited for
        low, high = self.bounds
        ratio = torch.exp(-schedule.logsnr(t) / 2)
        inside = (low < ratio) & (ratio <= high)
        if inside.all():
            return slice(None)
        return inside.nonzero()[:, 0] if inside.any() else None


EVERYWHERE = Interval()
"""All noise levels."""


def select(value: Tensor, rows: Rows) -> Tensor:
    """The rows of a tensor `[B, …]`; one value for all samples, shape `[]`, stays as it is."""
    return value[rows] if value.ndim else value
