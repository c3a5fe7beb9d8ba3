"""Ancestral sampling with the variance that the model learned."""

from collections.abc import Callable

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler
from diffx.samplers.ddpm import ancestral_step
from diffx.schedules import NoiseLevel


class DDPMLearned(Sampler):
    r"""`DDPM` with the v of `denoiser.posterior` in the place of a number.

    Nichol and Dhariwal, *Improved DDPM* (arXiv 2102.09672), Eq. 15: the variance is exp(v·log β + (1 − v)·log β̃), and
    with fewer steps than in training β and β̃ are those of the steps taken (Sec. 4). Use it when the model was trained
    with denoiser=learned_variance.
    """

    order = 1

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        state: None,
        *,
        noise: Callable[..., Tensor],
        **cond: Tensor,
    ) -> tuple[Tensor, None]:
        x_hat, v = denoiser.at(t).posterior(x_t, t.t, s.t, **cond)
        return ancestral_step(x_t, x_hat, t, s, v, noise), None
