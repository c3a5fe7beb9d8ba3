"""The variational bound as an objective."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffx.denoisers import Preconditioned
from diffx.likelihood.base import prior_nats
from diffx.likelihood.continuous import clean_end, error_nats, reconstruction_nats
from diffx.objectives.base import Objective
from diffx.schedules import Schedule
from diffx.time_samplers import Stratified
from diffx.utils import Keys


class ELBO(Objective):
    r"""The variational bound of −log p(x) in continuous time, in nats.

    KL(q(x_1 | x) ‖ N(0, σ_1²)) − log p(x | x_0) − ½·SNR′(t)·‖x − x̂(x_t, t)‖² with t uniform, one per stratum of the
    batch; see `ContinuousBound`. Kingma et al., *Variational Diffusion Models* (arXiv 2107.00630), Eqs. 15–17.

    The bound does not depend on the interior of a learned schedule, but its variance does. The interior therefore gets
    the gradient of the estimate's variance (their App. I.2), the ends that of the bound. As the noise level of a
    sample has the density p = |dt/dlogSNR|, that gradient is −E[L²·∇log p] at a fixed level: no derivative through
    the network is needed. It is scaled by the mean of L², so that it does not depend on the size of the images, and
    needs two samples per batch or more.

    Use it when likelihood counts, and with schedule=learned: where t is uniform, the noise levels of most other
    schedules are far from what this loss needs, and it varies more.

    Arguments:
        logsnr_max: the clean end, where x_0 is taken, unless the schedule ends before.
        levels: values per dimension in [−1, 1], 256 for 8-bit pixels; 0 for latents and other continuous data.
    """

    def __init__(self, logsnr_max: float = 13.3, levels: int = 256) -> None:
        super().__init__()
        self.logsnr_max = logsnr_max
        self.levels = levels
        self.strata = Stratified(t_min=0.0)

    def forward(self, denoiser: Preconditioned, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        schedule = denoiser.schedule
        start = clean_end(schedule, self.logsnr_max, x)
        u, _ = self.strata(schedule, keys)
        t = (start + (1 - start) * u).to(x.dtype)
        z = keys.normal("noise", *x.shape[1:], dtype=x.dtype)
        with _frozen(schedule.interior()):
            logsnr, slope = _logsnr_and_slope(schedule, t)
            diffusion = -(1 - start) * slope * error_nats(denoiser, x, t, z, **cond)
            prior = prior_nats(schedule, x)
            reconstruction = reconstruction_nats(schedule, x, start, keys, self.levels)
        bound = prior + reconstruction + diffusion
        terms = {
            "bpd": bound / (math.prod(x.shape[1:]) * math.log(2)),
            "prior": prior,
            "reconstruction": reconstruction,
            "diffusion": diffusion,
        }
        variance = _variance_gradient(schedule, t, diffusion.detach())
        return {"loss": bound + variance, "logsnr": logsnr.detach(), **{k: v.detach() for k, v in terms.items()}}


def _variance_gradient(schedule: Schedule, t: Tensor, diffusion: Tensor) -> Tensor:
    """Zeros `[B]`, whose gradient in the interior of the schedule is that of the diffusion term's variance."""
    interior = {id(p) for p in schedule.interior()}
    if not interior:
        return torch.zeros_like(t)
    with _frozen(p for p in schedule.parameters() if id(p) not in interior):
        logsnr, slope = _logsnr_and_slope(schedule, t)
        # the time at which the level stays what it is when the schedule moves; its value is t
        same_level = t - (logsnr - logsnr.detach()) / slope.detach()
        log_density = -_logsnr_and_slope(schedule, same_level)[1].abs().log()
    square = diffusion**2
    # the mean of ∇log p is 0: subtracting a constant takes noise away and nothing else
    surrogate = -(square / square.mean() - 1) * log_density
    return surrogate - surrogate.detach()


def _logsnr_and_slope(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """The logSNR and its derivative at times t `[B]`, differentiable in t and in the parameters of the schedule."""
    with torch.inference_mode(False), torch.enable_grad():
        t = t if t.requires_grad else t.clone().requires_grad_()
        logsnr = schedule.logsnr(t)
        return logsnr, torch.autograd.grad(logsnr.sum(), t, create_graph=True)[0]


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What is computed inside has no gradient in these parameters."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
