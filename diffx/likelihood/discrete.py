"""The variational bound of a model of T steps."""

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.likelihood.base import Likelihood, gaussian_nats, prior_nats
from diffx.schedules import LOGSNR_MAX, Schedule
from diffx.utils import Keys, expand_as


class DiscreteBound(Likelihood):
    r"""The variational bound of a model of T steps, with the reverse variances of choice.

    −log p(x) ≤ KL(q(x_T | x) ‖ N(0, σ_T²)) + Σ_{i ≥ 2} KL(q(x_{i−1} | x_i, x) ‖ p(x_{i−1} | x_i)) − log p(x | x_1).
    Ho et al., *Denoising Diffusion Probabilistic Models* (arXiv 2006.11239), Eqs. 5 and 13; Nichol and Dhariwal,
    *Improved DDPM* (arXiv 2102.09672), Sec. 2.1. Use it when the numbers shall be comparable with theirs, or the
    variances of ancestral sampling are compared.

    Arguments:
        steps: T ≥ 2.
        v: the place of the variance between its bounds, from 0 (β̃) to 1 (β); null for the one the model learned.
        draws: steps i ≥ 2 per sample, one per stratum; steps − 1 takes each of them.
        levels: values per dimension, 256 for 8-bit pixels; 0 for continuous data.
    """

    def __init__(self, steps: int = 1000, v: float | None = 0.0, draws: int = 50, levels: int = 256) -> None:
        self.steps = steps
        self.v = v
        self.draws = draws
        self.levels = levels

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        drawn = []
        for k in range(self.draws):
            u = (k + keys.at(k).uniform("likelihood/step", dtype=torch.float64)) / self.draws
            drawn.append(self._term(denoiser, x, 2 + (u * (self.steps - 1)).long(), keys.at(k), "noise", **cond))
        terms = {
            "prior": prior_nats(denoiser.schedule, x),
            "reconstruction": self._term(denoiser, x, torch.ones_like(keys.index), keys, "reconstruction", **cond),
            "diffusion": (self.steps - 1) * torch.stack(drawn).mean(0),
        }
        return {"nats": sum(terms.values(), start=torch.zeros(()).to(x)), **terms}

    def _term(self, denoiser: Denoiser, x: Tensor, i: Tensor, keys: Keys, stream: str, **cond: Tensor) -> Tensor:
        x_i = noisy(
            denoiser.schedule, x, i, self.steps, keys.normal(f"likelihood/{stream}", *x.shape[1:], dtype=x.dtype)
        )
        t, s = (i / self.steps).to(x.dtype), ((i - 1) / self.steps).to(x.dtype)
        if self.v is None:
            x_hat, v = denoiser.posterior(x_i, t, s, **cond)
        else:
            x_hat, v = denoiser(x_i, t, **cond), torch.full_like(x, self.v)
        return step_nats(denoiser.schedule, x, x_hat, v, i, self.steps, self.levels)


def noisy(schedule: Schedule, x: Tensor, i: Tensor, steps: int, z: Tensor) -> Tensor:
    """x_i = α_i·x + σ_i·z, `[B, *]`, at steps i, int64 `[B]`."""
    alpha, sigma = (expand_as(c.to(x.dtype), x) for c in schedule(i.double() / steps))
    return alpha * x + sigma * z


def step_nats(schedule: Schedule, x: Tensor, x_hat: Tensor, v: Tensor, i: Tensor, steps: int, levels: int) -> Tensor:
    r"""The term of step i of the bound, in nats.

    With ℓ = log β/β̃ = 2·log σ_i/σ_{i−1}, the KL of two Gaussians comes to
    ½·(v·ℓ + e^{−v·ℓ}·(1 + (SNR_{i−1} − SNR_i)·(x − x̂)²) − 1) per dimension. The first step is −log p(x | x_1), with a
    Gaussian around x̂ whose variance lies between β̃_2 and β_1 (the released code of both papers).

    Arguments:
        schedule: the forward process.
        x: clean samples, `[B, *]`.
        x_hat: the estimates at steps i, `[B, *]`.
        v: the place of the variance, `[B, *]`.
        i: the steps from i/T to (i − 1)/T, int64 `[B]` in [1, T].
        steps: T ≥ 2.
        levels: as for `gaussian_nats`.

    Returns:
        Nats, `[B]`.
    """
    # in float64: the levels of neighbouring steps are nearly equal
    alpha, sigma = schedule(torch.arange(1, 3, device=x.device).double() / steps)
    beta_1, beta_2 = sigma[0] ** 2, sigma[1] ** 2 - (alpha[1] / alpha[0] * sigma[0]) ** 2
    low, high = (beta_2 * (sigma[0] / sigma[1]) ** 2).log().to(x.dtype), beta_1.log().to(x.dtype)
    first = i == 1
    # nothing infinite where a term is not taken
    near = torch.where(expand_as(first, x), x_hat, x)
    decoder = gaussian_nats(x, near, torch.exp(0.5 * (v * high + (1 - v) * low)), levels)
    t, s = i.double() / steps, torch.where(first, i, i - 1).double() / steps
    gap = expand_as((schedule.logsnr(s).exp() - schedule.logsnr(t).exp()).to(x.dtype), x)
    floor = -LOGSNR_MAX / 2
    ratio = 2 * (schedule(t)[1].log().clamp(min=floor) - schedule(s)[1].log().clamp(min=floor))
    wider = v * expand_as(ratio.to(x.dtype), x)
    kl = 0.5 * (wider + torch.exp(-wider) * (1 + gap * (x - x_hat) ** 2) - 1)
    return torch.where(first, decoder, kl.flatten(1).sum(1))
