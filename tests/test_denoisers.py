"""The exact denoisers are exact, and what wraps a denoiser does to x̂ what it says."""

import math

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, each, mixture
from scipy import stats
from torch import nn

from diffx.conditioning import LabelConditioner
from diffx.denoisers import Denoiser, GaussianMixture, LearnedVariance, Preconditioned, Rescheduled
from diffx.guidance import ClassifierFree, StaticThresholding
from diffx.parameterizations import V
from diffx.samplers import DDPM
from diffx.samplers.ddpm_learned import DDPMLearned
from diffx.schedules import Cosine, Flow
from diffx.utils import DiffxError, Keys, expand_as

TIMES = [0.03, 0.4, 0.8]
# each schedule with itself and with two others, not all with all
SCHEDULES = choices("schedule")
TWO = [(s, SCHEDULES[(k + shift) % len(SCHEDULES)]) for k, s in enumerate(SCHEDULES) for shift in (0, 1, 4)]
every_two = pytest.mark.parametrize(("schedule", "trained"), TWO)


def frozen(choice):
    return build("schedule", choice).requires_grad_(False)


def noisy(denoiser, n, t, seed=0):
    """Samples of x_t, `[n, 2]`, at times t of shape `[]` or `[n]`."""
    keys = Keys(seed, torch.arange(n))
    x = denoiser.sample(keys.normal("x", 2, dtype=F64), keys.uniform("component"))
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(t))
    return alpha * x + sigma * keys.normal("z", 2, dtype=F64)


@each("schedule")
@pytest.mark.parametrize("t", TIMES)
def test_mixture_is_the_posterior_mean_by_brute_force(schedule, t):
    denoiser = mixture(frozen(schedule))
    alpha, sigma = (c.item() for c in denoiser.schedule(torch.tensor(t, dtype=F64)))
    axis = np.linspace(-4, 4, 20001)
    weights = denoiser.log_weights.exp().numpy()
    for x_t in noisy(denoiser, 3, torch.tensor(t, dtype=F64)):
        # per component the posterior factorises over the axes: one-dimensional integrals
        mass, first = np.zeros(3), np.zeros((3, 2))
        for k in range(3):
            moments = []
            for d in range(2):
                prior = stats.norm.pdf(axis, denoiser.means[k, d].item(), denoiser.stds[k, d].item())
                joint = prior * stats.norm.pdf(x_t[d].item(), alpha * axis, sigma)
                moments.append((np.trapezoid(joint, axis), np.trapezoid(joint * axis, axis)))
            mass[k] = weights[k] * moments[0][0] * moments[1][0]
            first[k] = mass[k] * np.array([moment[1] / moment[0] for moment in moments])
        x_hat = denoiser(x_t[None], torch.tensor(t, dtype=F64))[0]
        np.testing.assert_allclose(x_hat.numpy(), first.sum(0) / mass.sum(), rtol=1e-8, atol=1e-10)
        log_prob = denoiser.log_prob(x_t[None], torch.tensor(t, dtype=F64))[0]
        assert log_prob.item() == pytest.approx(np.log(mass.sum()), rel=1e-10)


@each("schedule")
def test_the_score_gives_the_estimate(schedule):
    # Tweedie: x̂ = (x_t + σ²·∇ log p)/α
    denoiser = mixture(frozen(schedule))
    t = torch.linspace(0.02, 0.95, 16, dtype=F64)
    x_t = noisy(denoiser, 16, t).requires_grad_()
    (score,) = torch.autograd.grad(denoiser.log_prob(x_t, t).sum(), x_t)
    alpha, sigma = (c[:, None] for c in denoiser.schedule(t))
    torch.testing.assert_close(denoiser(x_t, t), (x_t + sigma**2 * score) / alpha, rtol=1e-8, atol=1e-8)


@each("schedule")
def test_one_time_or_a_time_for_each_sample(schedule):
    denoiser = mixture(frozen(schedule))
    t = torch.tensor([0.1, 0.9], dtype=F64)  # B = D
    x_t = noisy(denoiser, 2, t)
    for k in range(2):
        torch.testing.assert_close(denoiser(x_t, t)[k], denoiser(x_t[k : k + 1], t[k])[0])
        torch.testing.assert_close(denoiser.log_prob(x_t, t)[k], denoiser.log_prob(x_t[k : k + 1], t[k])[0])


def test_log_prob_is_a_density():
    denoiser = mixture(Flow())
    axis = torch.linspace(-6, 6, 601, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    mass = denoiser.log_prob(x, torch.tensor(0.5, dtype=F64)).exp().sum() * 0.02**2
    assert mass.item() == pytest.approx(1, abs=1e-9)


def test_gaussian_has_the_closed_form():
    denoiser = GaussianMixture(torch.tensor([[0.3]], dtype=F64), torch.tensor([[0.7]], dtype=F64), Cosine())
    t = torch.tensor([0.2, 0.6], dtype=F64)
    alpha, sigma = (c[:, None] for c in denoiser.schedule(t))
    x_t = torch.tensor([[1.0], [-2.0]], dtype=F64)
    gain = alpha * 0.49 / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(denoiser(x_t, t), 0.3 + gain * (x_t - alpha * 0.3))


def test_a_label_restricts_the_mixture_to_its_component():
    denoiser = mixture(Cosine())
    t = torch.tensor(0.5, dtype=F64)
    x_t = noisy(denoiser, 4, t)
    x_hat = denoiser(x_t, t, label=torch.tensor([0, 1, 2, 3]))
    for k in range(3):
        alone = GaussianMixture(denoiser.means[k : k + 1], denoiser.stds[k : k + 1], denoiser.schedule)
        torch.testing.assert_close(x_hat[k : k + 1], alone(x_t[k : k + 1], t))
    torch.testing.assert_close(x_hat[3:], denoiser(x_t[3:], t))  # the null label


def test_samples_of_the_mixture_have_its_moments():
    denoiser = mixture(Cosine())
    keys = Keys(0, torch.arange(40000))
    x = denoiser.sample(keys.normal("x", 2, dtype=F64), keys.uniform("component"))
    weights = denoiser.log_weights.exp()[:, None]
    mean = (weights * denoiser.means).sum(0)
    variance = (weights * (denoiser.stds**2 + denoiser.means**2)).sum(0) - mean**2
    assert ((x.mean(0) - mean).abs() < 4 * (variance / len(x)).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * (2 / len(x)) ** 0.5).all()


@every_two
def test_rescheduling_keeps_the_estimate_at_equal_logsnr(schedule, trained):
    exact = mixture(frozen(schedule))
    rescheduled = Rescheduled(mixture(frozen(trained)), frozen(schedule))
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    # only where the trained schedule has been; beyond it the nearest level is all there is
    last = rescheduled.denoiser.schedule.logsnr(torch.ones((), dtype=F64))
    t = t[exact.schedule.logsnr(t) > last + 1e-3]
    x_t = noisy(exact, len(t), t)
    torch.testing.assert_close(rescheduled(x_t, t), exact(x_t, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rescheduled(x_t, t[3]), exact(x_t, t[3]), rtol=1e-9, atol=1e-9)


@every_two
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rescheduling_reaches_both_ends(schedule, trained, dtype):
    rescheduled = Rescheduled(mixture(frozen(trained), dtype), frozen(schedule))
    sigma_end = rescheduled.schedule(torch.ones((), dtype=dtype))[1]
    x = Keys(0, torch.arange(8)).normal("x", 2, dtype=dtype)
    at_end = rescheduled(sigma_end * x, torch.ones((), dtype=dtype))
    assert at_end.isfinite().all()
    assert at_end.dtype == dtype
    # pure noise tells nothing: the mean of the data, but for what the ends differ by
    weights = rescheduled.denoiser.log_weights.exp()[:, None]
    left = (
        0.4 if "Learned" in type(rescheduled.schedule).__name__ + type(rescheduled.denoiser.schedule).__name__ else 0.1
    )
    assert (at_end - (weights * rescheduled.denoiser.means).sum(0)).abs().max() < left
    clean = rescheduled.schedule.inverse(torch.full((), 13.0, dtype=dtype))
    torch.testing.assert_close(rescheduled(x, clean), x, rtol=0, atol=0.05)


# ---- the variance of a step ----


@each("schedule")
def test_the_variance_is_the_slope_of_the_estimate(schedule):
    # Tweedie's second formula: Var[x | x_t] = σ²/α·dx̂/dx_t
    denoiser = mixture(frozen(schedule))
    t, s = torch.linspace(0.05, 0.95, 16, dtype=F64), torch.linspace(0.02, 0.9, 16, dtype=F64)
    x_t = noisy(denoiser, 16, t).requires_grad_()
    x_hat, v = denoiser.posterior(x_t, t, s)
    assert x_hat.equal(denoiser(x_t, t))
    slopes = torch.stack([torch.autograd.grad(x_hat[:, d].sum(), x_t, retain_graph=True)[0][:, d] for d in (0, 1)], 1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((c[:, None] for c in denoiser.schedule(time)) for time in (t, s))
    gain = (alpha_s / sigma_s) ** 2 - (alpha_t / sigma_t) ** 2
    expected = torch.log1p(gain * sigma_t**2 / alpha_t * slopes) / (2 * (sigma_t / sigma_s).log())
    torch.testing.assert_close(v, expected, rtol=1e-7, atol=1e-9)


@each("schedule")
def test_with_the_exact_variance_ancestral_sampling_of_a_gaussian_is_exact(schedule):
    std = 0.6
    denoiser = GaussianMixture(torch.full((1, 1), 0.3, dtype=F64), torch.full((1, 1), std, dtype=F64), frozen(schedule))
    times = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    # x_t = 0, x_t = 1 and each noise alone: the sampler is affine in them
    x = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=F64)

    def noise(step, draw=0):
        return (torch.arange(4) == 2 + step)[:, None].to(F64)

    errors = []
    for sampler in (DDPMLearned(), DDPM(v=0.0)):
        out = sampler(denoiser, x, times, noise=noise)
        offset, slope, gains = out[0], out[1] - out[0], out[2:] - out[0]
        (alpha_t, alpha_s), (sigma_t, sigma_s) = (c[[0, 2]] for c in denoiser.schedule(times))
        variance = slope**2 * ((alpha_t * std) ** 2 + sigma_t**2) + gains.square().sum()
        errors.append(abs(variance / ((alpha_s * std) ** 2 + sigma_s**2) - 1).item())
        assert (slope * alpha_t * 0.3 + offset).item() == pytest.approx(0.3 * alpha_s.item(), rel=1e-8)
    assert errors[0] < 1e-8
    assert errors[1] > 1e-3


class Halves(nn.Module):
    """A network of two outputs per input channel."""

    def forward(self, x, logsnr):
        return torch.cat([torch.tanh(x) + 0.1 * logsnr[:, None, None, None], torch.sin(3 * x)], 1)


@each("parameterization")
def test_a_learned_variance_leaves_the_estimate_alone(parameterization):
    parameterization = build("parameterization", parameterization)
    denoiser = LearnedVariance(Halves(), Cosine(), parameterization)

    class First(nn.Module):
        def forward(self, x, logsnr):
            return Halves()(x, logsnr)[:, :3]

    plain = Preconditioned(First(), Cosine(), parameterization)
    x_t = Keys(0, torch.arange(4)).normal("x", 3, 2, 2)
    for t in (torch.tensor(0.4), torch.tensor([0.1, 0.3, 0.7, 0.9])):
        x_hat, v = denoiser.posterior(x_t, t, t / 2)
        assert x_hat.equal(plain(x_t, t)) and denoiser(x_t, t).equal(x_hat)
        at = plain.coefficients(t)
        assert all(a.equal(b) for a, b in zip(denoiser.coefficients(t), at, strict=True))
        assert denoiser.network(x_t, at).equal(plain.network(x_t, at))
        c_in = expand_as(parameterization(*denoiser.schedule(t))[0], x_t)
        torch.testing.assert_close(v, (torch.sin(3 * c_in * x_t) + 1) / 2)


def test_the_sampler_takes_the_learned_variance():
    denoiser = LearnedVariance(Halves(), Cosine(), V())
    x = Keys(0, torch.arange(4)).normal("x", 3, 2, 2)
    times = torch.linspace(1, 0, 6)

    def noise(step, draw=0):
        return Keys(1, torch.arange(4), step).normal("z", 3, 2, 2)

    sampler = build("sampler", "ddpm_learned")
    out = sampler(denoiser, x, times, noise=noise)
    for v in (0.0, 0.5, 1.0):
        assert not torch.allclose(out, DDPM(v)(denoiser, x, times, noise=noise), atol=1e-3)
    # one step of one dimension, by hand
    t, s = denoiser.schedule.levels(torch.tensor([0.8, 0.5]))
    x_hat, v = denoiser.posterior(x, t.t, s.t)
    beta = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    smaller = beta * s.sigma**2 / t.sigma**2
    std = torch.exp(0.5 * (v * math.log(beta) + (1 - v) * math.log(smaller)))
    mean = s.alpha * beta / t.sigma**2 * x_hat + t.alpha / s.alpha * s.sigma**2 / t.sigma**2 * x
    step, _ = sampler.step(denoiser, x, t, s, None, noise=lambda draw=0: torch.ones_like(x))
    torch.testing.assert_close(step, mean + std)


@pytest.mark.parametrize(
    "wrap",
    [lambda denoiser: Preconditioned(nn.Identity(), Cosine(), V()), lambda denoiser: Rescheduled(denoiser, Flow())],
)
def test_a_denoiser_without_variance_is_refused_by_the_sampler_that_needs_it(wrap):
    denoiser = wrap(LearnedVariance(Halves(), Cosine(), V()))
    x = torch.ones(2, 3, 2, 2)
    with pytest.raises(DiffxError, match="no learned variance") as refusal:
        DDPMLearned()(denoiser, x, torch.tensor([0.9, 0.5]), noise=torch.zeros)
    assert type(denoiser).__name__ in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_backbone_without_the_second_half_is_refused():
    class AsMany(nn.Module):
        def forward(self, x, logsnr):
            return x

    denoiser = LearnedVariance(AsMany(), Cosine(), V())
    with pytest.raises(DiffxError, match=r"backbone\.out_channels=6"):
        denoiser(torch.ones(2, 3, 2, 2), torch.tensor(0.5))


# ---- guidance and thresholding ----


class Counting(Denoiser):
    """Remembers the batches it is asked for."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.batches = []

    def forward(self, x_t, t, **cond):
        self.batches.append(len(x_t))
        return self.denoiser(x_t, t, **cond)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("t", [torch.tensor(0.5, dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)])
def test_classifier_free_guidance_by_hand(scale, t):
    denoiser = Counting(mixture(Cosine()))
    guided = ClassifierFree(denoiser, LabelConditioner(3), scale)
    x_t, label = noisy(denoiser.denoiser, 3, torch.tensor(0.5, dtype=F64)), torch.tensor([0, 1, 2])
    x_hat = guided(x_t, t, label=label)
    assert denoiser.batches == ([3] if scale == 1 else [6])
    conditional = denoiser(x_t, t, label=label)
    unconditional = denoiser(x_t, t, label=torch.full((3,), 3))
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(x_hat, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(conditional, unconditional)
    assert guided.schedule is denoiser.schedule


def test_guidance_is_affine():
    # guiding ε and turning the result into x̂ is guiding x̂
    denoiser, scale = mixture(Cosine()), 3.0
    t = torch.tensor(0.6, dtype=F64)
    x_t, label = noisy(denoiser, 3, t), torch.tensor([0, 1, 2])
    alpha, sigma = denoiser.schedule(t)
    eps_c, eps_0 = ((x_t - alpha * denoiser(x_t, t, label=c)) / sigma for c in (label, torch.full((3,), 3)))
    eps = (1 + 2.0) * eps_c - 2.0 * eps_0  # the paper's form, Eq. 6 with w = 2
    guided = ClassifierFree(denoiser, LabelConditioner(3), scale)(x_t, t, label=label)
    torch.testing.assert_close(guided, (x_t - sigma * eps) / alpha, rtol=1e-10, atol=1e-10)


def test_guidance_without_conditions_is_the_denoiser():
    denoiser = Counting(mixture(Cosine()))
    x_t, t = torch.ones(3, 2, dtype=F64), torch.tensor(0.5, dtype=F64)
    assert ClassifierFree(denoiser, LabelConditioner(3), 2.0)(x_t, t).equal(denoiser(x_t, t))
    assert denoiser.batches == [3, 3]


@each("thresholding")
def test_every_thresholding_keeps_what_is_in_range(thresholding):
    denoiser = mixture(Cosine())
    bounded = build("thresholding", thresholding)(denoiser)
    assert isinstance(bounded, Denoiser)
    assert bounded.schedule is denoiser.schedule
    x_t, t = torch.zeros(5, 2, dtype=F64), torch.tensor(0.9, dtype=F64)
    torch.testing.assert_close(bounded(x_t, t), denoiser(x_t, t))


def test_static_thresholding_clips():
    denoiser = mixture(Cosine())
    t = torch.tensor(0.02, dtype=F64)
    x_t = torch.tensor([[3.0, 0.4], [-3.0, -0.4]], dtype=F64)
    x_hat = denoiser(x_t, t)
    assert x_hat.abs().max() > 1.5
    assert StaticThresholding(denoiser)(x_t, t).equal(x_hat.clamp(-1, 1))
    assert StaticThresholding(denoiser, -0.5, 2.0)(x_t, t).equal(x_hat.clamp(-0.5, 2.0))


def test_conditions_reach_the_denoiser_through_every_wrapper():
    denoiser = mixture(Cosine())
    wrapped = StaticThresholding(Rescheduled(denoiser, Cosine()), -9, 9)
    x_t, t, label = torch.ones(3, 2, dtype=F64), torch.tensor(0.5, dtype=F64), torch.tensor([0, 1, 2])
    torch.testing.assert_close(wrapped(x_t, t, label=label), denoiser(x_t, t, label=label))
