"""Weighted denoising score matching."""

from torch import Tensor
from torch.nn.functional import mse_loss

from diffx.denoisers import Preconditioned
from diffx.objectives.base import Objective
from diffx.time_samplers import TimeSampler
from diffx.utils import Keys, expand_as
from diffx.weightings import Weighting


class Denoising(Objective):
    r"""The weighted squared error of the denoised estimate.

    E_{t, z} [w(t)·‖x̂(α·x + σ·z, t) − x‖²], the mean over a sample's dimensions. Ho et al. (arXiv 2006.11239), Eq. 12;
    Karras et al. (arXiv 2206.00364), Eq. 8; Kingma et al. (arXiv 2107.00630), Eq. 19. Computed in the network's space,
    as w·c_out²·‖F − F*‖² with the target F* that makes x̂ = x: nothing is divided by an α next to 0, and no difference
    of nearly equal images is taken. Use it when samples shall look good, which is nearly always.

    A learned weighting adds its penalty, and a time sampler that adapts is told the weighted errors in training mode.

    Arguments:
        time_sampler: density of the training times.
        weighting: w(t), in x̂-space.
    """

    def __init__(self, time_sampler: TimeSampler, weighting: Weighting) -> None:
        super().__init__()
        self.time_sampler = time_sampler
        self.weighting = weighting

    def forward(self, denoiser: Preconditioned, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        t, correction = self.time_sampler(denoiser.schedule, keys)
        at = denoiser.coefficients(t)
        alpha, sigma, _, _, c_skip, c_out = at
        known = denoiser.replaced(known=at)
        z = keys.normal("noise", *x.shape[1:], dtype=x.dtype)
        x_t = expand_as(alpha, x) * x + expand_as(sigma, x) * z
        output = denoiser.network(x_t, at, **cond)
        # F* = (x − c_skip·x_t)/c_out with x_t written out, so that the cancellation is one of numbers, not of images
        target = expand_as((1 - c_skip * alpha) / c_out, x) * x - expand_as(c_skip * sigma / c_out, x) * z
        error = mse_loss(output, target, reduction="none").flatten(1).mean(1)
        weighted = self.weighting(known, t) * c_out**2 * error
        if self.training:
            self.time_sampler.update(t, weighted.detach())
        loss = (weighted + self.weighting.penalty(known, t)) * correction
        return {"loss": loss, "logsnr": at.logsnr.detach()}
