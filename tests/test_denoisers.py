"""The exact denoisers are exact, and what wraps a denoiser does to x̂ what it says."""

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, each, mixture
from scipy import stats

from diffx.conditioning import LabelConditioner
from diffx.denoisers import Denoiser, GaussianMixture, Rescheduled
from diffx.guidance import ClassifierFree, StaticThresholding
from diffx.schedules import Cosine, Flow
from diffx.utils import Keys, expand_as

TIMES = [0.03, 0.4, 0.8]


def noisy(denoiser, n, t, seed=0):
    """Samples of x_t, `[n, 2]`, at times t of shape `[]` or `[n]`."""
    keys = Keys(seed, torch.arange(n))
    x = denoiser.sample(keys.normal("x", 2, dtype=F64), keys.uniform("component"))
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(t))
    return alpha * x + sigma * keys.normal("z", 2, dtype=F64)


@each("schedule")
@pytest.mark.parametrize("t", TIMES)
def test_mixture_is_the_posterior_mean_by_brute_force(schedule, t):
    denoiser = mixture(build("schedule", schedule))
    alpha, sigma = (c.item() for c in denoiser.schedule(torch.tensor(t, dtype=F64)))
    axis = np.linspace(-4, 4, 2001)
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
    denoiser = mixture(build("schedule", schedule))
    t = torch.linspace(0.02, 0.95, 16, dtype=F64)
    x_t = noisy(denoiser, 16, t).requires_grad_()
    (score,) = torch.autograd.grad(denoiser.log_prob(x_t, t).sum(), x_t)
    alpha, sigma = (c[:, None] for c in denoiser.schedule(t))
    torch.testing.assert_close(denoiser(x_t, t), (x_t + sigma**2 * score) / alpha, rtol=1e-8, atol=1e-8)


@each("schedule")
def test_one_time_or_a_time_for_each_sample(schedule):
    denoiser = mixture(build("schedule", schedule))
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


@each("schedule")
@pytest.mark.parametrize("trained", choices("schedule"))
def test_rescheduling_keeps_the_estimate_at_equal_logsnr(schedule, trained):
    exact = mixture(build("schedule", schedule))
    rescheduled = Rescheduled(mixture(build("schedule", trained)), build("schedule", schedule))
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    # only where the trained schedule has been; beyond it the nearest level is all there is
    last = rescheduled.denoiser.schedule.logsnr(torch.ones((), dtype=F64))
    t = t[exact.schedule.logsnr(t) > last + 1e-3]
    x_t = noisy(exact, len(t), t)
    torch.testing.assert_close(rescheduled(x_t, t), exact(x_t, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rescheduled(x_t, t[3]), exact(x_t, t[3]), rtol=1e-9, atol=1e-9)


@each("schedule")
@pytest.mark.parametrize("trained", choices("schedule"))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rescheduling_reaches_both_ends(schedule, trained, dtype):
    rescheduled = Rescheduled(mixture(build("schedule", trained), dtype), build("schedule", schedule))
    sigma_end = rescheduled.schedule(torch.ones((), dtype=dtype))[1]
    x = Keys(0, torch.arange(8)).normal("x", 2, dtype=dtype)
    at_end = rescheduled(sigma_end * x, torch.ones((), dtype=dtype))
    assert at_end.isfinite().all()
    assert at_end.dtype == dtype
    # pure noise tells nothing: the mean of the data, but for what the ends differ by
    weights = rescheduled.denoiser.log_weights.exp()[:, None]
    assert (at_end - (weights * rescheduled.denoiser.means).sum(0)).abs().max() < 0.1
    torch.testing.assert_close(rescheduled(x, torch.full((), 1e-6, dtype=dtype)), x, rtol=0, atol=0.05)


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


@each("guidance")
def test_every_guidance_is_a_denoiser_around_a_denoiser(guidance):
    denoiser = mixture(Cosine())
    guided = build("guidance", guidance)(denoiser, conditioner=LabelConditioner(3))
    assert isinstance(guided, Denoiser)
    assert guided.schedule is denoiser.schedule
    t = torch.tensor(0.5, dtype=F64)
    x_t = noisy(denoiser, 5, t)
    assert guided(x_t, t).shape == x_t.shape
    assert guided(x_t, t.expand(5), label=torch.tensor([0, 1, 2, 0, 1])).shape == x_t.shape


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
