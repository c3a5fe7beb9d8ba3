"""A shift of the time of another schedule."""

import torch
from torch import Tensor, nn

from diffx.schedules.base import Schedule


class TimeShift(Schedule):
    r"""Another schedule with its time shifted towards one end.

    The schedule is read at t′ = shift·t/(1 + (shift − 1)·t). Esser et al., *Scaling Rectified Flow Transformers* (arXiv
    2403.03206), Eq. 23, with shift = √(m/n) for m pixels where the schedule was made for n; on the flow schedule it
    equals `Shifted` up to a scaling. The ends stay. Use it when a flow model is trained or sampled at a high resolution
    (Stable Diffusion 3: shift = 3).

    Arguments:
        schedule: the schedule to shift.
        shift: > 0; above 1 more time is spent at high noise.
    """

    def __init__(self, schedule: Schedule, shift: float = 3.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.shift = shift

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # in float64: float32 would lose 1 − t' near the noisy end
        exact = t.to(torch.float64)
        alpha, sigma = self.schedule(self.shift * exact / (1 + (self.shift - 1) * exact))
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def inverse(self, logsnr: Tensor) -> Tensor:
        shifted = self.schedule.inverse(logsnr.to(torch.float64))
        return (shifted / (self.shift - (self.shift - 1) * shifted)).to(logsnr.dtype)

    def interior(self) -> list[nn.Parameter]:
        return self.schedule.interior()
