"""A shift of the logSNR of another schedule."""

import math

import torch
from torch import Tensor, nn

from diffx.schedules.base import Schedule


class Shifted(Schedule):
    r"""Another schedule with its logSNR shifted, for images of another size.

    logSNR(t) + 2·log(ratio) in the place of logSNR(t), at the same α² + σ². Hoogeboom et al., *Simple Diffusion* (arXiv
    2301.11093): averaging pixels lowers their noise but hardly their signal, so that an image of more pixels
    needs more noise to be destroyed as much; ratio = 64/d for d × d pixels. A variance-preserving schedule stays so.
    Use it when the resolution is not the one the schedule was made for.

    Arguments:
        schedule: the schedule to shift.
        ratio: side of the images it was made for, over the side of those at hand, > 0.
    """

    def __init__(self, schedule: Schedule, ratio: float = 0.5) -> None:
        super().__init__()
        self.schedule = schedule
        self.ratio = ratio

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        scale = torch.sqrt((alpha**2 + sigma**2) / ((self.ratio * alpha) ** 2 + sigma**2))
        return scale * self.ratio * alpha, scale * sigma

    def inverse(self, logsnr: Tensor) -> Tensor:
        return self.schedule.inverse(logsnr - 2 * math.log(self.ratio))

    def interior(self) -> list[nn.Parameter]:
        return self.schedule.interior()
