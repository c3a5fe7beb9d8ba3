"""Heun's method on the probability-flow ODE."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.samplers.base import Sampler, combined
from diffx.samplers.euler import derivative
from diffx.schedules import NoiseLevel


class Heun(Sampler):
    r"""Heun's method on the probability-flow ODE, in the schedule's own time.

    The trapezoidal rule with Euler's step as predictor. Karras et al., *Elucidating the Design Space of Diffusion-Based
    Generative Models* (arXiv 2206.00364), Alg. 1. Two denoiser calls per step, one in a step to the clean end, which is
    x̂ itself. The paper's choice of time is the `EDM` schedule's, where it equals `EDMHeun`, which is Heun's method in
    x/α and σ/α on every schedule: much better than this one where σ grows geometrically (`ve`). Use it when a
    flow-matching model is sampled, or when the effect of a schedule's own time is the question.
    """

    order = 2
    evaluations = 2

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
        x_hat = denoiser.at(t)(x_t, t.t, **cond)
        if not isinstance(s.sigma, Tensor) and s.sigma == 0:
            return x_hat, None
        (a, b), (a_s, b_s) = derivative(t), derivative(s)
        h = s.time - t.time
        x_hat_s = denoiser.at(s)(combined((1 + h * a, x_t), (h * b, x_hat)), s.t, **cond)
        # x_t + h/2·(d + d_s) with the predictor inserted into d_s: three multiples of tensors instead of five
        of_x = 1 + h / 2 * (a + a_s * (1 + h * a))
        of_x_hat = h / 2 * b * (1 + h * a_s)
        x_s = combined((of_x, x_t), (of_x_hat, x_hat), (h / 2 * b_s, x_hat_s))
        if isinstance(s.sigma, Tensor):  # some samples may reach the clean end before others
            x_s = torch.where(s.sigma == 0, x_hat, x_s)
        return x_s, None
