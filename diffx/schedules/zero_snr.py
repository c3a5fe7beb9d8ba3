"""Another schedule, rescaled to end at pure noise."""

import torch
from torch import Tensor, nn

from diffx.schedules.base import Schedule
from diffx.utils import DiffxError


class ZeroSNR(Schedule):
    r"""Another schedule, rescaled to end at pure noise.

    α′ = (α − α(1))·α(0)/(α(0) − α(1)), at the same α² + σ², so that α′(1) = 0. Lin et al., *Common Diffusion Noise
    Schedules and Sample Steps are Flawed* (arXiv 2305.08891), Alg. 1, with the clean end in the place of its first
    step. ε-prediction is undefined at t = 1. Use it when samples shall reach very dark and very bright images: training
    then ends where sampling starts, at pure noise.

    Arguments:
        schedule: the schedule to rescale, variance preserving.

    Raises:
        DiffxError: if its α does not fall (variance exploding).
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        with torch.no_grad():
            alpha, _ = schedule(torch.tensor([0.0, 1.0], device=schedule.device))
        if not alpha[1] < alpha[0]:
            raise DiffxError(
                f"schedule=zero_snr cannot rescale {type(schedule).__name__}, whose alpha does not fall with the time; "
                "give it a variance-preserving schedule (cosine, linear, ddpm)"
            )

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # in float64: α(0) − α next to the clean end is a difference of nearly equal numbers
        exact = t.to(torch.float64)
        alpha, sigma = self.schedule(exact)
        alpha_0, alpha_1 = self.schedule(torch.tensor([0.0, 1.0], dtype=exact.dtype, device=t.device))[0].unbind()
        rescaled = (alpha - alpha_1) * alpha_0 / (alpha_0 - alpha_1)
        # exactly 0 at t = 1, whatever the last bit of α in a batch; the slope stays
        rescaled = rescaled - rescaled.detach() * (exact == 1)
        lost = alpha_1 * (alpha_0 - alpha) / (alpha_0 - alpha_1)
        return rescaled.to(t.dtype), torch.sqrt(sigma**2 + lost * (alpha + rescaled)).to(t.dtype)

    def interior(self) -> list[nn.Parameter]:
        return self.schedule.interior()
