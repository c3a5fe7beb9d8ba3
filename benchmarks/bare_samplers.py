"""The samplers as one would write them for one schedule only: a loop over numbers that are computed beforehand."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffx.schedules import NoiseLevel

Model = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Model, Tensor], Tensor]


def ddim(levels: list[NoiseLevel]) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        ratio = s.sigma / t.sigma
        numbers.append((t.t, ratio, s.alpha - ratio * t.alpha))

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, a, b in numbers:
            x = a * x + b * model(x, t)
        return x

    return loop


def euler(levels: list[NoiseLevel]) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        h, of_x = s.time - t.time, t.d_sigma / t.sigma
        step = (1 + h * of_x, h * (t.d_alpha - t.alpha * of_x)) if s.sigma > 0 else (0.0, 1.0)
        numbers.append((t.t, *step))

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, a, b in numbers:
            x = a * x + b * model(x, t)
        return x

    return loop


def heun(levels: list[NoiseLevel]) -> Loop:
    numbers = []
    for t, s in pairwise(levels[:-1]):
        h = s.time - t.time
        (a, b), (a_s, b_s) = ((k.d_sigma / k.sigma, k.d_alpha - k.alpha * k.d_sigma / k.sigma) for k in (t, s))
        numbers.append((t.t, s.t, 1 + h * a, h * b, 1 + h / 2 * a, h / 2 * b, h / 2 * a_s, h / 2 * b_s))

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, s, a, b, c, d, e, f in numbers:
            x_hat = model(x, t)
            x_s = a * x + b * x_hat
            x = c * x + d * x_hat + e * x_s + f * model(x_s, s)
        return model(x, levels[-2].t)

    return loop


def dpmpp_2m(levels: list[NoiseLevel]) -> Loop:
    numbers = []
    before = None
    for t, s in pairwise(levels):
        gain = s.alpha - s.sigma * t.alpha / t.sigma
        r = (s.logsnr - t.logsnr) / (t.logsnr - before.logsnr) / 2 if before and s.sigma > 0 else 0.0
        numbers.append((t.t, s.sigma / t.sigma, gain * (1 + r), -gain * r))
        before = t

    def loop(model: Model, x: Tensor) -> Tensor:
        previous = torch.zeros_like(x)
        for t, a, b, c in numbers:
            x_hat = model(x, t)
            x = a * x + b * x_hat + c * previous
            previous = x_hat
        return x

    return loop


def ddpm(levels: list[NoiseLevel]) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        beta = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
        ratio = s.sigma / t.sigma
        numbers.append((t.t, t.alpha / s.alpha * ratio**2, s.alpha * beta / t.sigma**2, beta**0.5 * ratio))

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, a, b, c in numbers:
            x = a * x + b * model(x, t)
            if c > 0:
                x = x + c * torch.randn_like(x)
        return x

    return loop
