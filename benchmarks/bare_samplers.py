"""The samplers as one would write them for one grid only: numbers computed beforehand, and the fewest operations."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffx.samplers.base import ancestral, diffusion, forward_variance, rho, sqrt
from diffx.samplers.between import at_times, between, times_at
from diffx.samplers.phi import moments, phi, weights
from diffx.schedules import NoiseLevel, Schedule

Model = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Model, Tensor], Tensor]
Levels = list[NoiseLevel]


# ---- loops of one, two and three estimates per step ----


def one_call(numbers: list[tuple[Any, ...]]) -> Loop:
    """x ← a·x + b·x̂ + c·z."""

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, a, b, c in numbers:
            x = (a * x).add_(model(x, t), alpha=b)
            if c > 0:
                x.add_(torch.randn_like(x), alpha=c)
        return x

    return loop


def two_calls(numbers: list[tuple[Any, ...]], last: Tensor, renewed: tuple[float, float] = (1.0, 0.0)) -> Loop:
    """x ← g·x + h·z, x_m = a·x + b·x̂ and x ← c·x + d·x̂ + e·x̂_m + f·z; at last x̂ of g·x + h·z."""

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, m, a, b, c, d, e, f, g, h in numbers:
            if h > 0:
                x = (g * x).add_(torch.randn_like(x), alpha=h)
            x_hat = model(x, t)
            x_hat_m = model((a * x).add_(x_hat, alpha=b), m)
            x = (c * x).add_(x_hat, alpha=d).add_(x_hat_m, alpha=e)
            if f > 0:
                x.add_(torch.randn_like(x), alpha=f)
        g, h = renewed
        return model((g * x).add_(torch.randn_like(x), alpha=h) if h > 0 else x, last)

    return loop


def ddim(schedule: Schedule, levels: Levels, eta: float = 0.0) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        ratio, variance, _ = ancestral(t, s, eta)
        numbers.append((t.t, ratio, s.alpha - ratio * t.alpha, sqrt(variance)))
    return one_call(numbers)


def euler(schedule: Schedule, levels: Levels) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        h, of_x = s.time - t.time, t.d_sigma / t.sigma
        step = (1 + h * of_x, h * (t.d_alpha - t.alpha * of_x)) if s.sigma > 0 else (0.0, 1.0)
        numbers.append((t.t, *step, 0.0))
    return one_call(numbers)


def euler_maruyama(schedule: Schedule, levels: Levels) -> Loop:
    numbers = []
    for t, s in pairwise(levels[:-1]):
        h, f, g = s.time - t.time, t.d_alpha / t.alpha, t.d_sigma / t.sigma
        noise = (-2 * h * t.sigma**2 * (g - f)) ** 0.5
        numbers.append((t.t, 1 + h * (2 * g - f), 2 * h * t.alpha * (f - g), noise))
    return one_call([*numbers, (levels[-2].t, 0.0, 1.0, 0.0)])


def ddpm(schedule: Schedule, levels: Levels) -> Loop:
    numbers = []
    for t, s in pairwise(levels):
        beta, ratio = forward_variance(t, s), s.sigma / t.sigma
        numbers.append((t.t, t.alpha / s.alpha * ratio**2, s.alpha * beta / t.sigma**2, beta**0.5 * ratio))
    return one_call(numbers)


def heun(schedule: Schedule, levels: Levels) -> Loop:
    numbers = []
    for t, s in pairwise(levels[:-1]):
        h = s.time - t.time
        (a, b), (a_s, b_s) = ((k.d_sigma / k.sigma, k.d_alpha - k.alpha * k.d_sigma / k.sigma) for k in (t, s))
        c, d = 1 + h / 2 * (a + a_s * (1 + h * a)), h / 2 * b * (1 + h * a_s)
        numbers.append((t.t, s.t, 1 + h * a, h * b, c, d, h / 2 * b_s, 0.0, 1.0, 0.0))
    return two_calls(numbers, levels[-2].t)


def edm(schedule: Schedule, levels: Levels, churn: float = 0.0) -> Loop:
    gamma = 2 * torch.tensor(min(churn / (len(levels) - 1), 2**0.5 - 1)).log1p().item()
    raised = levels
    if churn:
        raised = at_times(schedule, times_at(schedule, [t.logsnr - gamma for t in levels[:-1]]), levels[0])
    numbers = []
    for before, t, s in zip(levels, raised, levels[1:-1], strict=False):
        ratio = s.sigma / t.sigma
        gain = s.alpha - ratio * t.alpha
        w = gain / 2 * rho(t) / rho(s)
        noise = sqrt(forward_variance(t, before)) if t is not before else 0.0
        numbers.append((t.t, s.t, ratio, gain, ratio, gain - w, w, 0.0, t.alpha / before.alpha, noise))
    # the last estimate is of samples with new noise too
    t, before = raised[len(levels) - 2], levels[-2]
    renewed = (t.alpha / before.alpha, sqrt(forward_variance(t, before))) if churn else (1.0, 0.0)
    return two_calls(numbers, t.t, renewed)


def two_stage(schedule: Schedule, levels: Levels, of_eps: bool, eta: float = 0.0) -> Loop:
    numbers = []
    inside = between(schedule, levels, (0.5,), eta)
    for (t, s), (m,) in zip(pairwise(levels[:-1]), inside, strict=False):
        ratio, variance, _ = ancestral(t, s, eta)
        gain, ratio_m = s.alpha - ratio * t.alpha, m.sigma / t.sigma
        w = gain * (rho(t) / rho(m) if of_eps else 1.0)
        numbers.append((t.t, m.t, ratio_m, m.alpha - ratio_m * t.alpha, ratio, gain - w, w, sqrt(variance), 1.0, 0.0))
    return two_calls(numbers, levels[-2].t)


def dpm_solver_3(schedule: Schedule, levels: Levels) -> Loop:
    numbers = []
    for (t, s), (m, n) in zip(pairwise(levels[:-1]), between(schedule, levels, (1 / 3, 2 / 3)), strict=False):
        h, h_m, h_n = ((level.logsnr - t.logsnr) / 2 for level in (s, m, n))
        w_m, w_n = n.sigma * h_n**2 / h_m * phi(2, h_n) / rho(m), s.sigma * h**2 / h_n * phi(2, h)
        ratios = [level.sigma / t.sigma for level in (m, n, s)]
        gains = [level.alpha - ratio * t.alpha for level, ratio in zip((m, n, s), ratios, strict=True)]
        of_m, of_n = -w_n * w_m / n.sigma, w_n / rho(n)
        numbers.append((t.t, m.t, n.t, ratios, gains, w_m, of_m, of_n))

    def loop(model: Model, x: Tensor) -> Tensor:
        for t, m, n, (a, b, c), (d, e, f), w_m, of_m, of_n in numbers:
            x_hat = model(x, t)
            x_hat_m = model((a * x).add_(x_hat, alpha=d), m)
            x_hat_n = model((b * x).add_(x_hat, alpha=e - w_m).add_(x_hat_m, alpha=w_m), n)
            x = (c * x).add_(x_hat, alpha=f - of_m - of_n).add_(x_hat_m, alpha=of_m).add_(x_hat_n, alpha=of_n)
        return model(x, levels[-2].t)

    return loop


# ---- loops that remember estimates ----


def multistep(numbers: list[tuple[Any, ...]], last: Tensor) -> Loop:
    """x ← a·x + b·x̂ + Σ c_j·x̂_j + d·z, of the estimates before; at last x̂."""

    def loop(model: Model, x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for t, a, b, c, d in numbers:
            x_hat = model(x, t)
            x = (a * x).add_(x_hat, alpha=b)
            for w, estimate in zip(c, past, strict=False):
                x.add_(estimate, alpha=w)
            if d > 0:
                x.add_(torch.randn_like(x), alpha=d)
            past = [x_hat, *past[: len(c) or 1]]
        return model(x, last)

    return loop


def dpmpp_2m(schedule: Schedule, levels: Levels, eta: float = 0.0) -> Loop:
    numbers, before = [], None
    for t, s in pairwise(levels[:-1]):
        ratio, variance = diffusion(t, s, eta)
        gain = s.alpha - ratio * t.alpha
        r = (s.logsnr - t.logsnr) / (t.logsnr - before.logsnr) / 2 if before else 0.0
        numbers.append((t.t, ratio, gain * (1 + r), [-gain * r] if before else [], sqrt(variance)))
        before = t
    return multistep(numbers, levels[-2].t)


def dpmpp_3m(schedule: Schedule, levels: Levels, eta: float = 0.0) -> Loop:
    numbers = []
    for k, (t, s) in enumerate(pairwise(levels[:-1])):
        ratio, variance = diffusion(t, s, eta)
        h = (s.logsnr - t.logsnr) / 2
        nodes = [(p.logsnr - t.logsnr) / (2 * h) for p in levels[max(0, k - 2) : k + 1][::-1]]
        c = [s.alpha * w for w in weights(nodes, moments((1 + eta) * h, len(nodes)))[1:]]
        numbers.append((t.t, ratio, s.alpha - ratio * t.alpha - sum(c), c, sqrt(variance)))
    return multistep(numbers, levels[-2].t)


def adams_bashforth(schedule: Schedule, levels: Levels, sampler: Any) -> Loop:
    """x ← a·x + b·x̂ + Σ c_j·ε̂_j, ε̂ = p·x + q·x̂, with the weights of a sampler of diffx; at last x̂."""
    plan = sampler.init(type("Of", (), {"schedule": schedule})(), levels).plan
    numbers = []
    for (t, s), w in zip(pairwise(levels[:-1]), plan, strict=False):
        c = [s.alpha * value for value in w]
        a = (s.sigma - sum(c)) / t.sigma
        numbers.append((t.t, a, s.alpha - a * t.alpha, c, 1 / t.sigma, -t.alpha / t.sigma))

    def loop(model: Model, x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for t, a, b, c, p, q in numbers:
            x_hat = model(x, t)
            eps = (p * x).add_(x_hat, alpha=q)
            x = (a * x).add_(x_hat, alpha=b)
            for w, estimate in zip(c, past, strict=False):
                x.add_(estimate, alpha=w)
            past = [eps, *past[: sampler.estimates - 2]]
        return model(x, levels[-2].t)

    return loop


def pndm(schedule: Schedule, levels: Levels) -> Loop:
    firsts = list(pairwise(levels))[:3]
    middles = at_times(schedule, [(t.time + s.time) / 2 for t, s in firsts], levels[0])

    def of_eps(level: NoiseLevel) -> tuple[float, float]:
        return 1 / level.sigma, -level.alpha / level.sigma

    def to(t: NoiseLevel, s: NoiseLevel, shares: list[float]) -> tuple[float, float, list[float]]:
        c = [s.alpha * (rho(s) - rho(t)) * share for share in shares]
        a = (s.sigma - sum(c)) / t.sigma
        return a, s.alpha - a * t.alpha, c

    first = [
        (t.t, m.t, s.t, of_eps(t), of_eps(m), of_eps(s), to(t, m, []), to(t, m, [1]), to(t, s, [1]), to(t, s, [1 / 3, 1 / 3, 1 / 6]))  # noqa: E501
        for (t, s), m in zip(firsts, middles, strict=True)
    ]  # fmt: skip
    later = [(t.t, of_eps(t), to(t, s, [-59 / 24, 37 / 24, -9 / 24])) for t, s in list(pairwise(levels[:-1]))[3:]]

    def affine(x: Tensor, x_hat: Tensor, a: float, b: float) -> Tensor:
        return (a * x).add_(x_hat, alpha=b)

    def loop(model: Model, x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for t, m, s, e_t, e_m, e_s, (a, b, _), (c, d, (w,)), (e, f, (v,)), (g, h, (i, j, k)) in first:
            x_hat = model(x, t)
            past = [affine(x, x_hat, *e_t), *past]
            y = affine(x, x_hat, a, b)
            eps_1 = affine(y, model(y, m), *e_m)
            y = affine(x, x_hat, c, d).add_(eps_1, alpha=w)
            eps_2 = affine(y, model(y, m), *e_m)
            y = affine(x, x_hat, e, f).add_(eps_2, alpha=v)
            eps_3 = affine(y, model(y, s), *e_s)
            x = affine(x, x_hat, g, h).add_(eps_1, alpha=i).add_(eps_2, alpha=j).add_(eps_3, alpha=k)
        for t, e_t, (a, b, (c, d, e)) in later:
            x_hat = model(x, t)
            eps = affine(x, x_hat, *e_t)
            x = affine(x, x_hat, a, b).add_(past[0], alpha=c).add_(past[1], alpha=d).add_(past[2], alpha=e)
            past = [eps, *past[:2]]
        return model(x, levels[-2].t)

    return loop


def unipc(schedule: Schedule, levels: Levels, order: int = 3) -> Loop:
    def coefficients(t: NoiseLevel, s: NoiseLevel, others: Levels) -> tuple[float, float, list[float]]:
        h = (s.logsnr - t.logsnr) / 2
        nodes = [(level.logsnr - t.logsnr) / (2 * h) for level in others]
        if len(nodes) == 1:
            c = [s.alpha * moments(h, 1)[0] / 2 / nodes[0]]
        else:
            c = [s.alpha * w for w in weights([0.0, *nodes], moments(h, len(nodes) + 1))[1:]]
        ratio = s.sigma / t.sigma
        return ratio, s.alpha - ratio * t.alpha - sum(c), c

    numbers, corrector = [], None
    for k, (t, s) in enumerate(pairwise(levels[:-1])):
        others = levels[max(0, k + 1 - order) : k][::-1]
        numbers.append((t.t, corrector, coefficients(t, s, others)))
        corrector = coefficients(t, s, [*others, s])

    def loop(model: Model, x: Tensor) -> Tensor:
        corrected, past = x, []
        for t, corrector, (a, b, c) in numbers:
            x_hat = model(x, t)
            if corrector is not None:
                d, e, f = corrector
                corrected = (d * corrected).add_(past[0], alpha=e)
                for w, estimate in zip(f, [*past[1:], x_hat], strict=True):
                    corrected.add_(estimate, alpha=w)
            past = [x_hat, *past[: order - 1]]
            x = (a * corrected).add_(x_hat, alpha=b)
            for w, estimate in zip(c, past[1:], strict=True):
                x.add_(estimate, alpha=w)
        return model(x, levels[-2].t)

    return loop


def predictor_corrector(schedule: Schedule, levels: Levels, r: float = 0.16) -> Loop:
    numbers = []
    for t, s in pairwise(levels[:-1]):
        beta, ratio = forward_variance(t, s), s.sigma / t.sigma
        step = (t.alpha / s.alpha * ratio**2, s.alpha * beta / t.sigma**2, beta**0.5 * ratio)
        numbers.append((t.t, s.t, *step, 1 / s.sigma, -s.alpha / s.sigma, s.sigma))

    def loop(model: Model, x: Tensor) -> Tensor:
        axes = tuple(range(1, x.ndim))
        for t, s, a, b, c, p, q, sigma in numbers:
            x = (a * x).add_(model(x, t), alpha=b).add_(torch.randn_like(x), alpha=c)
            x_hat, z = model(x, s), torch.randn_like(x)
            eps = (p * x).add_(x_hat, alpha=q)
            norms = (torch.linalg.vector_norm(y, dim=axes, keepdim=True) for y in (z, eps))
            step = r * next(norms) / next(norms)
            x = x.addcmul(sigma * step, z, value=2).addcmul_(sigma * step**2, eps, value=-2)
        return model(x, levels[-2].t)

    return loop
