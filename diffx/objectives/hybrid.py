"""IDDPM's objective, which also trains the variances."""

import math

from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.likelihood.discrete import noisy, step_nats
from diffx.objectives.base import Objective
from diffx.time_samplers import TimeSampler
from diffx.utils import Keys
from diffx.weightings import Weighting


class Hybrid(Objective):
    r"""The denoising loss at the steps of a discrete model, with a little of the variational bound for the variances.

    L_simple + λ·L_vlb, where L_vlb is T times the bound's term of the step drawn, in bits per dimension, and x̂ is held
    fixed in it, so that it moves the variances alone. Nichol and Dhariwal, *Improved DDPM* (arXiv 2102.09672), Eq. 16.
    Use it when denoiser=learned_variance; the denoising loss leaves the variances as they are.

    Arguments:
        time_sampler: density of the training times, rounded up to multiples of 1/T; the bound's weights suppose a
            uniform one.
        weighting: w(t) of the denoising loss, in x̂-space.
        steps: T ≥ 2, the number of discrete steps.
        vlb_weight: λ ≥ 0.
        levels: values per dimension, 256 for 8-bit pixels; 0 for continuous data.
    """

    def __init__(
        self,
        time_sampler: TimeSampler,
        weighting: Weighting,
        steps: int = 1000,
        vlb_weight: float = 0.001,
        levels: int = 256,
    ) -> None:
        super().__init__()
        self.time_sampler = time_sampler
        self.weighting = weighting
        self.steps = steps
        self.vlb_weight = vlb_weight
        self.levels = levels

    def forward(self, denoiser: Preconditioned, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        drawn, correction = self.time_sampler(denoiser.schedule, keys)
        i = (drawn * self.steps).ceil().long().clamp(1, self.steps)
        t, s = (i / self.steps).to(x.dtype), ((i - 1) / self.steps).to(x.dtype)
        x_t = noisy(denoiser.schedule, x, i, self.steps, keys.normal("noise", *x.shape[1:], dtype=x.dtype))
        x_hat, v = denoiser.posterior(x_t, t, s, **cond)
        # in x̂-space: no level of a discrete model is so clean that differences of images lose their digits
        simple = self.weighting(denoiser, t) * (x_hat - x).square().flatten(1).mean(1)
        if self.training:
            self.time_sampler.update(drawn, simple.detach())
        nats = step_nats(denoiser.schedule, x, x_hat.detach(), v, i, self.steps, self.levels)
        vlb = self.steps * nats / (math.prod(x.shape[1:]) * math.log(2))
        loss = (simple + self.weighting.penalty(denoiser, t) + self.vlb_weight * vlb) * correction
        logsnr = denoiser.schedule.logsnr(t).detach()
        return {"loss": loss, "logsnr": logsnr, "simple": simple.detach(), "vlb": vlb.detach()}
