"""The variational bound in continuous time."""

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.likelihood.base import Likelihood, gaussian_nats, prior_nats
from diffx.schedules import Schedule
from diffx.schedules.base import logsnr
from diffx.utils import Keys, expand_as


class ContinuousBound(Likelihood):
    r"""The variational bound of a model of infinitely many steps.

    −log p(x) ≤ KL(q(x_1 | x) ‖ N(0, σ_1²)) − E[log p(x | x_0)] − ½·∫ SNR′(t)·E‖x − x̂(x_t, t)‖² dt, where p(x | x_0) is
    a Gaussian around x_0/α_0, integrated over the cells of the pixels' values. Kingma et al., *Variational Diffusion
    Models* (arXiv 2107.00630), Eqs. 15–17. It depends on a schedule through its two ends only, and so does this
    estimate, which draws the logSNR uniformly between them. Use it when models of different schedules are compared.

    Arguments:
        draws: noise levels per sample, one per stratum, ≥ 1.
        logsnr_max: the clean end, where x_0 is taken, unless the schedule ends before.
        levels: values per dimension, 256 for 8-bit pixels; 0 for continuous data.
    """

    def __init__(self, draws: int = 20, logsnr_max: float = 13.3, levels: int = 256) -> None:
        self.draws = draws
        self.logsnr_max = logsnr_max
        self.levels = levels

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        schedule = denoiser.schedule
        start = clean_end(schedule, self.logsnr_max, x)
        first, last = schedule.logsnr(torch.stack([start, torch.ones_like(start)]).double())
        drawn = []
        for k in range(self.draws):
            u = (k + keys.at(k).uniform("likelihood/level", dtype=torch.float64)) / self.draws
            t = schedule.inverse(torch.lerp(first, last, u)).to(x.dtype)
            z = keys.at(k).normal("likelihood/noise", *x.shape[1:], dtype=x.dtype)
            drawn.append(error_nats(denoiser, x, t, z, **cond))
        terms = {
            "prior": prior_nats(schedule, x),
            "reconstruction": reconstruction_nats(schedule, x, start, keys, self.levels),
            "diffusion": (first - last).to(x.dtype) * torch.stack(drawn).mean(0),
        }
        return {"nats": sum(terms.values(), start=torch.zeros(()).to(x)), **terms}


def clean_end(schedule: Schedule, logsnr_max: float, x: Tensor) -> Tensor:
    """The time of the clean end, `[]`: that of `logsnr_max`, or 0 where the schedule ends before."""
    with torch.no_grad():
        return schedule.inverse(torch.tensor(logsnr_max, dtype=torch.float64, device=x.device)).to(x.dtype)


def reconstruction_nats(schedule: Schedule, x: Tensor, start: Tensor, keys: Keys, levels: int) -> Tensor:
    """−log p(x | x_0) at the clean end, `[B]`."""
    alpha, sigma = schedule(start)
    z = keys.normal("likelihood/reconstruction", *x.shape[1:], dtype=x.dtype)
    return gaussian_nats(x, x + sigma / alpha * z, sigma / alpha, levels)


def error_nats(denoiser: Denoiser, x: Tensor, t: Tensor, z: Tensor, **cond: Tensor) -> Tensor:
    """½·SNR(t)·‖x − x̂(x_t, t)‖² at times t `[B]` with noise z `[B, *]`: the bound per unit of logSNR, `[B]`."""
    alpha, sigma = denoiser.schedule(t)
    x_hat = denoiser(expand_as(alpha, x) * x + expand_as(sigma, x) * z, t, **cond)
    return 0.5 * logsnr(alpha, sigma).exp() * (x - x_hat).square().flatten(1).sum(1)
