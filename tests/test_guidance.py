"""Guided estimates are what their densities say, guided samples land where they must, and no guide works unasked."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, each, no_noise
from test_cli import TINY, run
from torch import nn

from diffx.autoencoders import Autoencoder, Pixels
from diffx.conditioning import LabelConditioner, Unconditional
from diffx.denoisers import Autocast, Denoiser, GaussianMixture
from diffx.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    DynamicThresholding,
    Interval,
    Negative,
    NoisyClassifier,
    Projected,
    StaticThresholding,
    ToldNothing,
    fit_noisy_classifier,
    stacked,
)
from diffx.metrics import Classifier, extract
from diffx.schedules import EDM, Cosine, Flow
from diffx.utils import DiffxError, Keys, expand_as

torch.set_num_threads(1)

CLASSES = 3
LABELS = LabelConditioner(CLASSES)
SCALES = [0.0, 0.5, 1.0, 3.0]
# as many samples as dimensions or channels: a forgotten broadcast shows
SHAPES = [pytest.param((2,), id="[B,D]"), pytest.param((2, 2, 3), id="[B,C,H,W]")]
TIMES = [
    pytest.param(torch.tensor(0.4, dtype=F64), id="[]"),
    pytest.param(torch.tensor([0.15, 0.7], dtype=F64), id="[B]"),
]


class Shaped(Denoiser):
    """A mixture whose samples have any shape, and that remembers how many samples it was asked for."""

    def __init__(self, mixture, shape):
        super().__init__()
        self.mixture, self.shape, self.schedule = mixture, shape, mixture.schedule
        self.batches = []

    def forward(self, x_t, t, **cond):
        self.batches.append(len(x_t))
        return self.mixture(x_t.flatten(1), t, **cond).reshape(len(x_t), *self.shape)

    def posterior(self, x_t, t, s, **cond):
        return tuple(value.view_as(x_t) for value in self.mixture.posterior(x_t.flatten(1), t, s, **cond))

    def log_prob(self, x_t, t, label=None):
        """log p(x_t), or log p(x_t | label)."""
        flat, mixture = x_t.flatten(1), self.mixture
        if label is None:
            return mixture.log_prob(flat, t)
        alone = [GaussianMixture(mixture.means[k, None], mixture.stds[k, None], self.schedule) for k in label]
        times = t.expand(len(x_t))
        return torch.cat([p.log_prob(flat[i, None], times[i]) for i, p in enumerate(alone)])


def oracle(shape, schedule, spread=1.0):
    """Three classes, each a Gaussian; none is symmetric to another."""
    keys = Keys(7, torch.arange(CLASSES))
    means = keys.normal("means", math.prod(shape), dtype=F64)
    stds = spread * (0.2 + 0.3 * keys.uniform("stds", math.prod(shape), dtype=F64))
    return Shaped(GaussianMixture(means, stds, schedule, torch.tensor([0.5, 0.3, 0.2], dtype=F64)), shape)


def noisy(denoiser, t, n=2, seed=0):
    """x_t of shape `[n, *]` and labels `[n]`."""
    keys = Keys(seed, torch.arange(n))
    x = denoiser.mixture.sample(keys.normal("x", math.prod(denoiser.shape), dtype=F64), keys.uniform("component"))
    x = x.reshape(n, *denoiser.shape)
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(t))
    return alpha * x + sigma * keys.normal("z", *denoiser.shape, dtype=F64), torch.arange(n) % CLASSES


def tweedie(log_density, x_t, t, schedule):
    """The estimate whose score is that of a log-density, normalised or not."""
    x_t = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(x_t).sum(), x_t)
    alpha, sigma = (expand_as(c, x_t) for c in schedule(t))
    return ((x_t + sigma**2 * score) / alpha).detach()


class ExactClassifier(nn.Module):
    """log p(y | x_t) of a mixture, from variance-preserving samples and their logSNR; counts what it is asked."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.batches = []

    def forward(self, u, logsnr):
        self.batches.append(len(u))
        alpha, sigma = (torch.sigmoid(sign * logsnr).sqrt()[:, None, None] for sign in (1, -1))
        return self.mixture._components(u.flatten(1), alpha, sigma)[0]


# ----- the score of the guided estimate is that of p₊^w·p₋^(1−w)


@each("schedule")
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_classifier_free_guidance_has_the_score_of_the_tilted_density(scale, shape, t, schedule):
    denoiser = oracle(shape, build("schedule", schedule))
    x_t, label = noisy(denoiser, t)

    def log_density(x):
        return scale * denoiser.log_prob(x, t, label) + (1 - scale) * denoiser.log_prob(x, t)

    expected = tweedie(log_density, x_t, t, denoiser.schedule)
    x_hat = ClassifierFree(denoiser, LABELS, scale)(x_t, t, label=label)
    torch.testing.assert_close(x_hat, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_negative_guidance_has_the_score_of_the_density_divided_by_that_of_the_class(scale, shape, t):
    denoiser = oracle(shape, Cosine())
    x_t, label = noisy(denoiser, t)
    avoided = torch.full_like(label, 2)

    def log_density(x):
        return scale * denoiser.log_prob(x, t, label) + (1 - scale) * denoiser.log_prob(x, t, avoided)

    expected = tweedie(log_density, x_t, t, denoiser.schedule)
    guided = Negative(denoiser, LABELS, label=2, scale=scale)
    torch.testing.assert_close(guided(x_t, t, label=label), expected, rtol=1e-7, atol=1e-7)
    own = guided(x_t, t, label=avoided)  # there is nothing to move away from
    torch.testing.assert_close(own, denoiser(x_t, t, label=avoided))
    anything = guided(x_t, t)  # told no class, it is the unconditional model that is guided
    torch.testing.assert_close(anything, guided(x_t, t, label=torch.full_like(label, CLASSES)))


@each("schedule")
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_autoguidance_asks_a_guide_of_any_schedule_at_equal_logsnr(shape, t, schedule):
    scale = 2.5
    denoiser, guide = oracle(shape, Cosine()), oracle(shape, build("schedule", schedule), spread=1.6)
    same = oracle(shape, Cosine(), spread=1.6)
    x_t, label = noisy(denoiser, t)

    def log_density(x):
        return scale * denoiser.log_prob(x, t, label) + (1 - scale) * same.log_prob(x, t, label)

    expected = tweedie(log_density, x_t, t, denoiser.schedule)
    guided = Autoguidance(denoiser, guide, scale)
    torch.testing.assert_close(guided(x_t, t, label=label), expected, rtol=1e-6, atol=1e-6)
    assert (guided.guide is guide) == (schedule == "cosine")  # nothing is inverted where nothing has to be


# ----- classifier guidance


@each("schedule")
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_exact_classifier_turns_the_unconditional_model_into_the_conditional_one(scale, shape, t, schedule):
    denoiser = oracle(shape, build("schedule", schedule))
    x_t, label = noisy(denoiser, t)
    guided = ClassifierGuidance(ToldNothing(denoiser, LABELS), LABELS, ExactClassifier(denoiser.mixture), scale)
    with torch.no_grad():
        x_hat = guided(x_t, t, label=label)
    # p(x_t)·p(y | x_t)^w ∝ p(x_t | y)^w·p(x_t)^(1 − w)
    torch.testing.assert_close(
        x_hat, ClassifierFree(denoiser, LABELS, scale)(x_t, t, label=label), rtol=1e-7, atol=1e-7
    )
    if scale == 1:
        torch.testing.assert_close(x_hat, denoiser(x_t, t, label=label), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", TIMES)
def test_a_class_for_all_needs_no_labels_and_no_class_is_no_guidance(t):
    denoiser = oracle((2,), Cosine())
    x_t, _ = noisy(denoiser, t)
    classifier = ExactClassifier(denoiser.mixture)
    to_2 = ClassifierGuidance(denoiser, Unconditional(), classifier, 1.0, label=2)
    torch.testing.assert_close(to_2(x_t, t), denoiser(x_t, t, label=torch.tensor([2, 2])), rtol=1e-7, atol=1e-7)
    guided = ClassifierGuidance(ToldNothing(denoiser, LABELS), LABELS, classifier, 1.0)
    x_hat = guided(x_t, t, label=torch.tensor([0, CLASSES]))
    torch.testing.assert_close(x_hat[0], denoiser(x_t, t, label=torch.tensor([0, 0]))[0], rtol=1e-7, atol=1e-7)
    assert x_hat[1].equal(denoiser(x_t, t)[1])


def test_classifier_guidance_in_inference_mode_and_differentiated():
    denoiser, t = oracle((2,), Cosine()), torch.tensor([0.3, 0.6], dtype=F64)
    x_t, label = noisy(denoiser, t)
    guided = ClassifierGuidance(ToldNothing(denoiser, LABELS), LABELS, ExactClassifier(denoiser.mixture))
    expected = guided(x_t, t, label=label)
    with torch.inference_mode():
        torch.testing.assert_close(guided(x_t * 1, t * 1, label=label), expected)
        assert ClassifierGuidance(denoiser, LABELS, Product())(x_t * 1, t * 1, label=label % 2).isfinite().all()
    x_t.requires_grad_()
    # at scale 1 it is the conditional model, hence has the same derivative
    mine, exact = (
        torch.autograd.grad(model(x_t, t, label=label).square().sum(), x_t)[0] for model in (guided, denoiser)
    )
    torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-7)


# ----- samples


def samples(denoiser, ratios, steps, **cond):
    """What Heun makes of four starting points `[4, 1]` at σ/α = ratios[0], and the points divided by α.

    The grid takes `steps` steps between one ratio and the next, then one to the clean end: none straddles a ratio.
    """
    schedule = denoiser.schedule
    logs = [np.linspace(*np.log(pair), steps, endpoint=False) for pair in itertools.pairwise(ratios)]
    levels = torch.from_numpy(-2 * np.append(np.concatenate(logs), math.log(ratios[-1])))
    times = torch.cat([schedule.inverse(levels), torch.zeros(1, dtype=F64)])
    alpha, sigma = schedule(times[0])
    x_T = torch.tensor([[-1.5], [-0.4], [0.3], [2.0]], dtype=F64) * sigma
    return build("sampler", "heun")(denoiser, x_T, times, noise=no_noise, **cond), x_T / alpha


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guided_samples_of_equal_gaussians_are_a_shifted_gaussian(schedule, scale):
    # the guided score is that of N(α·m, α²s² + σ²) at every t, with m = w·μ₊ + (1 − w)·μ₋: of N(m, s²), noised
    means, std = torch.tensor([[-0.5], [0.8]], dtype=F64), 0.4
    classes = GaussianMixture(means, torch.full((2, 1), std, dtype=F64), build("schedule", schedule))
    guided = Negative(classes, LabelConditioner(2), label=0, scale=scale)
    m = scale * 0.8 + (1 - scale) * -0.5
    errors = []
    for steps in (40, 80):
        x, y_T = samples(guided, (30.0, 0.001), steps, label=torch.ones(4, dtype=torch.int64))
        errors.append((x - m - std * (y_T - m) / math.hypot(std, 30.0)).abs().max().item())
    assert errors[1] < 0.01
    assert errors[0] / errors[1] > 3  # the second order of Heun, hence the limit is the closed form


@pytest.mark.parametrize("schedule", ["cosine", "edm"])
@pytest.mark.parametrize("interval", [None, (0.3, 2.0)])
def test_guided_samples_of_unequal_gaussians_within_an_interval_solve_the_equation(schedule, interval):
    # with y = x_t/α and r = σ/α: dy/dr = r·(y − μ)·(w/(s₊² + r²) + (1 − w)/(s₋² + r²)), and w = 1 outside the interval
    scale, mu, std, std_guide = 2.0, 0.3, 0.5, 0.9

    def gaussian(std, schedule):
        return GaussianMixture(torch.tensor([[mu]], dtype=F64), torch.tensor([[std]], dtype=F64), schedule)

    model, guide = gaussian(std, build("schedule", schedule)), gaussian(std_guide, Flow())
    ratios = (30.0, 2.0, 0.3, 0.001)

    def factor(*scales):
        parts = zip(scales, itertools.pairwise((*ratios[:-1], 0.0)), strict=True)
        spans = [
            (w, [math.log((v**2 + low**2) / (v**2 + high**2)) / 2 for v in (std, std_guide)])
            for w, (high, low) in parts
        ]
        return math.exp(sum(w * own + (1 - w) * other for w, (own, other) in spans))

    x, y_T = samples(Autoguidance(model, guide, scale, interval), ratios, 60)
    everywhere, nowhere, within = (mu + (y_T - mu) * factor(*w) for w in ((2, 2, 2), (1, 1, 1), (1, 2, 1)))
    expected = everywhere if interval is None else within
    torch.testing.assert_close(x, expected, rtol=0, atol=0.01)
    for other in {everywhere, nowhere, within} - {expected}:
        assert (expected - other).abs().max() > 0.05


# ----- where and how often


def guides(denoiser, guide, classifier, **settings):
    """Every guidance with an interval, with what counts the guide's work."""
    return {
        "cfg": (ClassifierFree(denoiser, LABELS, 3.0, **settings), denoiser),
        "negative": (Negative(denoiser, LABELS, 2, 3.0, **settings), denoiser),
        "autoguidance": (Autoguidance(denoiser, guide, 3.0, **settings), guide),
        "classifier": (ClassifierGuidance(denoiser, LABELS, classifier, 3.0, **settings), classifier),
    }


@pytest.mark.parametrize("name", ["cfg", "negative", "autoguidance", "classifier"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_guide_works_inside_the_interval_only(shape, name):
    denoiser, guide = oracle(shape, Cosine()), oracle(shape, EDM(), 1.5)
    classifier = ExactClassifier(denoiser.mixture)
    everywhere, _ = guides(denoiser, guide, classifier)[name]
    inside, counter = guides(denoiser, guide, classifier, interval=[0.2, 1.5])[name]
    both = name in ("cfg", "negative")  # in one pass with the estimate itself
    t = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=F64)  # σ/α: 0.10, 0.53, 1.02, 6.6
    x_t, label = noisy(denoiser, t, 4)[0], torch.tensor([0, 1, 0, 1])
    unguided, guided = denoiser(x_t, t, label=label), everywhere(x_t, t, label=label)
    assert not torch.isclose(unguided, guided).flatten(1).all(1)[1:].any()

    def asked(t, x_t=x_t, label=label):
        counter.batches.clear()
        return inside(x_t, t, label=label), counter.batches

    x_hat, batches = asked(t)
    expected = torch.where(expand_as(torch.tensor([False, True, True, False]), x_t), guided, unguided)
    torch.testing.assert_close(x_hat, expected)
    assert batches == ([4 + 2] if both else [2])
    for k, within in enumerate([False, True, True, False]):
        x_hat, batches = asked(t[k])
        alone = everywhere if within else denoiser
        torch.testing.assert_close(x_hat, alone(x_t, t[k], label=label))
        assert asked(t[k])[1] == ([8 if within else 4] if both else [4] * within)
        x_hat, batches = asked(t[k].expand(1), x_t[k : k + 1], label[k : k + 1])
        torch.testing.assert_close(x_hat[0], expected[k])


def test_an_interval_is_open_below_and_closed_above():
    schedule = EDM(1.0)  # σ/α = t
    t = torch.tensor([0.25, 0.3, 0.5, 0.6], dtype=F64)
    low, high = (torch.exp(-schedule.logsnr(t[k]) / 2).item() for k in (0, 2))
    assert Interval([low, high]).rows(schedule, t).tolist() == [1, 2]
    assert Interval([low, high]).rows(schedule, t[0]) is None
    assert Interval([low, high]).rows(schedule, t[2]) == slice(None)


@pytest.mark.parametrize("interval", [[1.0], [2.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [1, 2, 3]])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(DiffxError, match=r"guidance\.interval"):
        ClassifierFree(oracle((2,), Cosine()), LABELS, 2.0, interval)


@pytest.mark.parametrize("name", ["cfg", "negative", "autoguidance"])
def test_at_scale_one_only_the_model_is_asked(name):
    denoiser, guide, t = oracle((2,), Cosine()), oracle((2,), EDM()), torch.tensor(0.5, dtype=F64)
    x_t, label = noisy(denoiser, t)
    guided, _ = guides(denoiser, guide, ExactClassifier(denoiser.mixture))[name]
    guided.scale = 1.0
    assert guided(x_t, t, label=label).equal(denoiser(x_t, t, label=label))
    assert denoiser.batches == [2, 2] and guide.batches == []
    off = ClassifierGuidance(denoiser, LABELS, ExactClassifier(denoiser.mixture), 0.0)
    assert off(x_t, t, label=label).equal(denoiser(x_t, t, label=label)) and off.classifier.batches == []


# ----- how two estimates become one


def estimates(shape, t):
    denoiser = oracle(shape, Cosine())
    x_t, label = noisy(denoiser, t)
    positive = denoiser(x_t, t, label=label)
    return denoiser, x_t, label, positive.numpy(), denoiser(x_t, t).numpy()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_by_hand(phi, shape, t):
    denoiser, x_t, label, positive, guide = estimates(shape, t)
    x_hat = ClassifierFree(denoiser, LABELS, 4.0, rescale=phi)(x_t, t, label=label).numpy()
    for k in range(2):
        plain = guide[k] + 4.0 * (positive[k] - guide[k])
        np.testing.assert_allclose(x_hat[k], phi * plain * positive[k].std() / plain.std() + (1 - phi) * plain)
    if phi == 1:
        np.testing.assert_allclose(x_hat.reshape(2, -1).std(1), positive.reshape(2, -1).std(1))


def test_rescaling_leaves_a_constant_image():
    one = GaussianMixture(torch.tensor([[0.3], [0.9]], dtype=F64), torch.ones(2, 1, dtype=F64), Cosine())
    x_t, t = torch.ones(2, 1, dtype=F64), torch.tensor(0.5, dtype=F64)
    guided = (
        ClassifierFree(one, LabelConditioner(2), 3.0, rescale=phi)(x_t, t, label=torch.tensor([0, 1])) for phi in (0, 1)
    )
    torch.testing.assert_close(*guided)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm_threshold", [None, 0.3])
def test_projected_guidance_by_hand(norm_threshold, eta, shape, t):
    denoiser, x_t, label, positive, guide = estimates(shape, t)
    rule = Projected(eta, norm_threshold)
    x_hat = ClassifierFree(denoiser, LABELS, 4.0, rule=rule)(x_t, t, label=label).numpy()
    for k in range(2):
        delta, onto = (positive[k] - guide[k]).ravel(), positive[k].ravel()
        length = np.linalg.norm(delta)
        if norm_threshold and length > norm_threshold:
            delta = delta * norm_threshold / length
        parallel = onto * (delta @ onto) / (onto @ onto)
        expected = onto + 3.0 * (delta - parallel + eta * parallel)
        np.testing.assert_allclose(x_hat[k].ravel(), expected, rtol=1e-9, atol=1e-12)
    if eta == 1 and norm_threshold is None:
        linear = ClassifierFree(denoiser, LABELS, 4.0)(x_t, t, label=label)
        np.testing.assert_allclose(x_hat, linear.numpy(), rtol=1e-9)


def test_projected_guidance_agrees_with_an_independent_implementation():
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    positive, guide = (Keys(0, torch.arange(4)).normal(name, 3, 8, 8) for name in ("positive", "guide"))
    theirs = normalized_guidance(positive, guide, 4.0, None, 0.3, 6.0, use_original_formulation=True)
    torch.testing.assert_close(Projected(0.3, 6.0)(positive, guide, 5.0), theirs, rtol=1e-5, atol=1e-5)
    same = Projected(0.3, 6.0)(positive, positive, 5.0)  # a difference of nothing has no direction
    torch.testing.assert_close(same, positive)


def test_projected_guidance_remembers_along_a_trajectory():
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    class Theirs(Denoiser):
        """Asked twice per step of Heun's method, in the same order."""

        def __init__(self, denoiser):
            super().__init__()
            self.denoiser, self.schedule, self.buffer = denoiser, denoiser.schedule, MomentumBuffer(-0.5)

        def forward(self, x_t, t, label):
            positive, guide = (self.denoiser(x_t, t, label=y) for y in (label, torch.full_like(label, CLASSES)))
            return normalized_guidance(positive, guide, 3.0, self.buffer, 0.3, 0.5, use_original_formulation=True)

    denoiser = oracle((2, 2, 3), Cosine())
    x_t, label = noisy(denoiser, torch.tensor(0.9, dtype=F64), 4)
    times = torch.linspace(0.9, 0.1, 6, dtype=F64)
    sampler = build("sampler", "heun")
    expected = sampler(Theirs(denoiser), x_t, times, noise=no_noise, label=label)
    rule = Projected(0.3, 0.5, momentum=-0.5)
    guided = Autocast(StaticThresholding(ClassifierFree(denoiser, LABELS, 4.0, rule=rule), -9, 9), "32-true")
    for _ in range(2):  # a trajectory leaves nothing behind for the next
        actual = sampler(guided, x_t, times, noise=no_noise, label=label)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for k in range(4):
        alone = sampler(guided, x_t[k : k + 1], times, noise=no_noise, label=label[k : k + 1])
        torch.testing.assert_close(alone, expected[k : k + 1], rtol=1e-9, atol=1e-9)
    # two trajectories side by side do not hear of each other
    pairs = [sampler.trajectory(guided, x_t[k::2], times, noise=no_noise, label=label[k::2]) for k in range(2)]
    *_, ends = zip(*pairs, strict=True)
    torch.testing.assert_close(torch.stack(ends, 1).flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    without = sampler(
        ClassifierFree(denoiser, LABELS, 4.0, rule=Projected(0.3, 0.5)), x_t, times, noise=no_noise, label=label
    )
    assert (without - expected).abs().max() > 1e-2


def test_momentum_without_steps_before_is_refused():
    guided = ClassifierFree(oracle((2,), Cosine()), LABELS, 4.0, rule=Projected(momentum=-0.5))
    x_t, label = noisy(guided.denoiser, torch.tensor(0.9, dtype=F64), 4)
    with pytest.raises(DiffxError, match=r"momentum=-0\.5 needs a sampler"):
        guided(x_t, torch.tensor(0.9, dtype=F64), label=label)
    times = torch.tensor([0.9, 0.1], dtype=F64)
    with pytest.raises(DiffxError, match="than adaptive"):
        build("sampler", "adaptive")(guided, x_t, times, noise=no_noise, label=label)
    with pytest.raises(DiffxError, match="between -1 and 1"):
        Projected(momentum=1.0)


class Given(Denoiser):
    """A denoiser that says what it was given."""

    def __init__(self, x_hat):
        super().__init__()
        self.x_hat, self.schedule = x_hat, Cosine()

    def forward(self, x_t, t, **cond):
        return self.x_hat

    def posterior(self, x_t, t, s, **cond):
        return self.x_hat, -self.x_hat


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("percentile", "bound"), [(0.9, 1.0), (0.5, 0.4), (1.0, 0.1), (0.995, 1.0)])
def test_dynamic_thresholding_by_hand(percentile, bound, shape):
    x_hat = 1.5 * Keys(0, torch.arange(5)).normal("x", *shape, dtype=F64)
    x_hat[4] *= 0.01  # within the bounds: left alone
    t = torch.tensor(0.5, dtype=F64)
    bounded = DynamicThresholding(Given(x_hat), percentile, bound)(x_hat, t)
    for k, image in enumerate(x_hat.numpy()):
        s = max(bound, np.quantile(np.abs(image), percentile, method="inverted_cdf"))
        np.testing.assert_allclose(bounded[k].numpy(), np.clip(image, -s, s) / s * bound)
    assert bounded.abs().max() <= bound + 1e-12
    assert bounded[4].equal(x_hat[4])
    for wrapper in (DynamicThresholding, StaticThresholding):
        wrapped = wrapper(Given(x_hat))
        assert all(
            value.equal(e) for value, e in zip(wrapped.posterior(x_hat, t, t), (wrapped(x_hat, t), -x_hat), strict=True)
        )
    with pytest.raises(DiffxError, match="percentile"):
        DynamicThresholding(Given(x_hat), 99.5)


# ----- together


def test_a_stack_goes_from_the_inside_out():
    denoiser, guide = oracle((2,), Cosine()), oracle((2,), Flow(), 1.5)
    t = torch.tensor([0.2, 0.6], dtype=F64)
    x_t, label = noisy(denoiser, t)

    def cfg(inner, conditioner):
        return ClassifierFree(inner, conditioner, 3.0)

    def auto(inner, conditioner):
        return Autoguidance(inner, guide, 2.0)

    def classifier(inner, conditioner):
        return ClassifierGuidance(inner, conditioner, ExactClassifier(denoiser.mixture), 0.5)

    plain, null = denoiser(x_t, t, label=label), denoiser(x_t, t)
    weak = Autoguidance(denoiser, guide, 0.0)(x_t, t, label=label)
    both = stacked(denoiser, LABELS, a=cfg, b=auto)(x_t, t, label=label)
    torch.testing.assert_close(both, weak + 2 * ((null + 3 * (plain - null)) - weak))
    # ∇ log p(y | x_t) is that of log p(x_t | y) − log p(x_t), so that all of it is affine
    three = stacked(denoiser, LABELS, a=classifier, b=cfg, c=StaticOf)(x_t, t, label=label)
    inner = plain + 0.5 * (plain - null)
    torch.testing.assert_close(three, (null + 3 * (inner - null)).clamp(-1, 1), rtol=1e-7, atol=1e-7)
    assert stacked(denoiser, LABELS) is denoiser


def StaticOf(inner, conditioner):
    return StaticThresholding(inner)


STACK = ["guidance=stacked", "+guidance@guidance.a=cfg", "+guidance@guidance.b=negative", "guidance.a.scale=3",
         "guidance.b.label=2", "guidance.b.interval=[0.2,2]"]  # fmt: skip
APG = ["guidance=cfg", "guidance.scale=3", "guidance.rule={_target_:diffx.guidance.Projected,eta:0.4}"]


def configured(*overrides):
    """The guidance that a command line asks for."""
    from diffx.cli.budget import set_steps
    from diffx.cli.build import make
    from diffx.cli.compose import compose_config

    return make(compose_config("train", list(overrides), [], set_steps), "guidance")


def test_the_command_line_stacks_and_swaps_the_rule():

    denoiser = oracle((2,), Cosine())
    t = torch.tensor([0.2, 0.6], dtype=F64)
    x_t, label = noisy(denoiser, t)
    expected = {
        "stack": Negative(ClassifierFree(denoiser, LABELS, 3.0), LABELS, 2, 1.5, [0.2, 2]),
        "rule": ClassifierFree(denoiser, LABELS, 3.0, rule=Projected(0.4)),
    }
    for name, overrides in (("stack", STACK), ("rule", APG)):
        guided = configured(*overrides)(denoiser, LABELS)
        torch.testing.assert_close(guided(x_t, t, label=label), expected[name](x_t, t, label=label))
    for wrong in ("guidance.rule.eta=0.4", "guidance.scale=much", "guidance.interval=[0.2]", "guidance.skale=2"):
        with pytest.raises(DiffxError):
            configured("guidance=cfg", wrong)(denoiser, LABELS)


NEEDS = {"negative": {"label": 1}, "classifier": {"classifier": ExactClassifier}}


@pytest.mark.parametrize("guidance", [c for c in choices("guidance") if c != "autoguidance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_guidance_treats_every_sample_on_its_own(shape, guidance):
    denoiser = oracle(shape, Cosine())
    needs = {k: v(denoiser.mixture) if isinstance(v, type) else v for k, v in NEEDS.get(guidance, {}).items()}
    guided = build("guidance", guidance, **needs)(denoiser, LABELS)
    assert isinstance(guided, Denoiser) and guided.schedule is denoiser.schedule
    t = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    x_t, label = noisy(denoiser, t, 3)
    together = guided(x_t, t, label=label)
    # the variance of a step back is the model's own
    x_hat, v = guided.posterior(x_t, t, t / 2, label=label)
    told = torch.full_like(label, CLASSES) if guidance == "unconditional" else label
    torch.testing.assert_close((x_hat, v), (together, denoiser.posterior(x_t, t, t / 2, label=told)[1]))
    for k in range(3):
        alone = guided(x_t[k : k + 1], t[k], label=label[k : k + 1])
        torch.testing.assert_close(together[k], alone[0])


def test_what_a_model_cannot_be_guided_by_is_refused():
    denoiser = oracle((2,), Cosine())
    for guided, word in (
        (lambda c: ClassifierFree(denoiser, c), "conditional"),
        (lambda c: Negative(denoiser, c, 1), "classes"),
        (lambda c: ClassifierGuidance(denoiser, c, nn.Identity()), r"guidance\.label"),
    ):
        with pytest.raises(DiffxError, match=word):
            guided(Unconditional())
    with pytest.raises(DiffxError, match="no class 3"):
        Negative(denoiser, LABELS, 3)


# ----- the trained classifier


@pytest.fixture(scope="module")
def fitted():
    """A classifier of noisy digits, trained for a few seconds."""
    torch.manual_seed(0)
    return fit_noisy_classifier(
        NoisyClassifier(1, 8, 10, width=16),
        build("data", "digits"),
        Pixels(),
        Cosine(),
        build("time_sampler", "stratified"),
        lambda parameters: torch.optim.AdamW(parameters, lr=4e-3),
        lambda step: 1 - step / 160,
        max_steps=160,
        progress=False,
    )


class Product(nn.Module):
    """A classifier whose gradient needs the noise level itself."""

    def forward(self, u, logsnr):
        return u.flatten(1) * logsnr[:, None]


class Digits(Denoiser):
    """The exact denoiser of the training images, or their latents, a little blurred, without labels."""

    def __init__(self, schedule, autoencoder=None):
        super().__init__()
        split = build("data", "digits").split("train")
        batch = split.get(torch.arange(0, len(split), 2))
        x = (autoencoder or Pixels()).encode(batch).flatten(1)
        self.mixture, self.schedule = GaussianMixture(x, torch.full_like(x, 0.1), schedule), schedule

    def forward(self, x_t, t, **cond):
        return self.mixture(x_t.flatten(1), t).view_as(x_t)


def test_the_classifier_learns_at_each_noise_level_what_can_be_known(fitted):
    accuracy = list(fitted.about["accuracy"].values())
    assert accuracy[-1] > 0.85  # hardly any noise
    assert accuracy[0] < 0.4  # hardly any image
    assert fitted.about["data"] == "digits" and fitted.about["schedule"] == "Cosine"
    u = Keys(0, torch.arange(3)).normal("u", 1, 8, 8)
    beyond, last = (fitted(u, torch.full((3,), level)) for level in (fitted.logsnr_max + 9, fitted.logsnr_max))
    torch.testing.assert_close(beyond, last, rtol=1e-3, atol=1e-3)  # told the nearest level of its training
    assert not fitted.training and not any(p.requires_grad for p in fitted.parameters())


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
def test_the_classifier_guides_to_its_class_on_any_schedule(fitted, schedule):
    denoiser = Digits(build("schedule", schedule))
    index = torch.arange(40)
    label = index % 10
    times = build("discretization", "logsnr")(denoiser.schedule, 10).float()
    x_T = Keys(1, index).normal("sample", 1, 8, 8) * denoiser.schedule(times[0])[1]
    shares = []
    for model in (denoiser, ClassifierGuidance(denoiser, LabelConditioner(10), fitted, 2.0)):
        x = build("sampler", "ddim")(
            model, x_T, times, noise=no_noise, **({} if model is denoiser else {"label": label})
        )
        images = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        shares.append((extract(Classifier.shipped("digits"), images)[1].argmax(1) == label).float().mean().item())
    assert shares[0] < 0.3
    assert shares[1] > 0.8


class Quarters(Autoencoder):
    """A stand-in for an autoencoder: every second pixel is a channel of its own, at half the contrast."""

    def encode(self, batch):
        return nn.functional.pixel_unshuffle(0.5 * Pixels().encode(batch), 2)

    def decode(self, latent):
        return Pixels().decode(2 * nn.functional.pixel_shuffle(latent, 2))

    def latent_shape(self, channels, image_size):
        return 4 * channels, image_size // 2, image_size // 2


def test_the_classifier_sees_the_latents_that_the_denoiser_sees():
    torch.manual_seed(0)
    autoencoder, source = Quarters(), build("data", "digits")
    classifier = fit_noisy_classifier(
        NoisyClassifier(4, 4, 10, width=16),
        source,
        autoencoder,
        Cosine(),
        build("time_sampler", "stratified"),
        lambda parameters: torch.optim.AdamW(parameters, lr=4e-3),
        lambda step: 1 - step / 200,
        max_steps=200,
        progress=False,
    )
    assert list(classifier.about["accuracy"].values())[-1] > 0.8
    assert classifier.about["autoencoder"] == "Quarters"
    denoiser, index = Digits(Cosine(), autoencoder), torch.arange(40)
    times = build("discretization", "logsnr")(denoiser.schedule, 10).float()
    x_T, label = Keys(1, index).normal("sample", 4, 4, 4), index % 10
    shares = []
    for scale in (0.0, 3.0):
        guided = ClassifierGuidance(denoiser, LabelConditioner(10), classifier, scale)
        x = build("sampler", "ddim")(guided, x_T, times, noise=no_noise, label=label)
        logits = extract(Classifier.shipped("digits"), autoencoder.decode(x))[1]
        shares.append((logits.argmax(1) == label).float().mean().item())
    assert shares[0] < 0.3
    assert shares[1] > 0.7


def test_the_command_fits_and_uses_a_classifier_of_latents(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/autoencoder").mkdir(parents=True)
    (tmp_path / "conf/autoencoder/quarters.yaml").write_text("_target_: test_guidance.Quarters\n")
    words = ["--config-dir", "conf", "autoencoder=quarters"]
    fit = ["fit-classifier", *words, "training.max_steps=1", "classifier.width=8", "progress_bar=false"]
    assert run(capsys, *fit, "out=c.safetensors")[0] == 0
    assert NoisyClassifier.load("c.safetensors").shape == {"channels": 4, "image_size": 4, "num_classes": 10}
    train = ["train", *words, *TINY, "backbone.in_channels=4", "backbone.image_size=4", "evaluation.num_samples=0"]
    assert run(capsys, *dict.fromkeys(train))[0] == 0
    (weights,) = tmp_path.glob("runs/digits/*/seed0/weights/ema.safetensors")
    sample = ["sample", f"run={weights.parents[1]}", "n=4", "guidance=classifier", "sampler.steps=2"]
    code, _, err = run(capsys, *sample, "guidance.classifier.weights=c.safetensors")
    assert code == 0, err
    # a classifier of pixels is refused before anything is sampled
    assert run(capsys, *(word for word in fit if word != "autoencoder=quarters"), "out=p.safetensors")[0] == 0
    code, _, err = run(capsys, *sample, "guidance.classifier.weights=p.safetensors")
    assert code == 2 and "4x4x4" in err and err.count("\n") == 1


@each("schedule")
def test_the_shift_is_bounded_at_both_ends(fitted, schedule):
    schedule = build("schedule", schedule)
    guided = ClassifierGuidance(Given(torch.zeros(3, 1, 8, 8)), LabelConditioner(10), fitted, 1.0)
    guided.schedule = schedule
    z = Keys(0, torch.arange(3)).normal("z", 1, 8, 8)
    for time in (0.0, 1.0):
        t = torch.tensor(time)
        x_hat = guided((schedule(t)[0] ** 2 + schedule(t)[1] ** 2).sqrt() * z, t, label=torch.tensor([0, 4, 9]))
        assert x_hat.isfinite().all() and x_hat.abs().max() < 10


def test_the_classifier_survives_a_file_and_others_are_refused(fitted, tmp_path):
    file = tmp_path / "c.safetensors"
    fitted.save(file)
    loaded = NoisyClassifier.load(str(file), channels=1, image_size=8, num_classes=10)
    u, logsnr = Keys(0, torch.arange(3)).normal("u", 1, 8, 8), torch.tensor([-30.0, 0.0, 30.0])
    assert loaded(u, logsnr).equal(fitted(u, logsnr))
    assert loaded.about == fitted.about
    assert (loaded.logsnr_min, loaded.logsnr_max) == (fitted.logsnr_min, fitted.logsnr_max)
    assert not loaded.training
    mistakes = {
        "1x28x28": lambda: NoisyClassifier.load(str(file), image_size=28),
        "3x8x8": lambda: NoisyClassifier.load(str(file), channels=3),
        "100 classes": lambda: NoisyClassifier.load(str(file), num_classes=100),
        "1x16x16": lambda: loaded(torch.zeros(2, 1, 16, 16), torch.zeros(2)),
        "no classifier at": lambda: NoisyClassifier.load(str(tmp_path / "none.safetensors")),
    }
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    mistakes["damaged"] = lambda: NoisyClassifier.load(str(tmp_path / "cut.safetensors"))
    Classifier.shipped("digits").save(tmp_path / "other.safetensors")
    mistakes["of noisy images"] = lambda: NoisyClassifier.load(str(tmp_path / "other.safetensors"))
    for word, mistake in mistakes.items():
        with pytest.raises(DiffxError, match=word) as refused:
            mistake()
        assert "fit-classifier" in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_trains_and_the_config_takes_the_file(tmp_path, capsys):
    from diffx.cli.fit_classifier import main as fit_classifier

    file = tmp_path / "noisy.safetensors"
    argv = ["schedule=flow", "training.max_steps=3", "classifier.width=8", "progress_bar=false", f"out={file}"]
    assert fit_classifier(argv) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy by logSNR" in said and str(file) in said
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    first = NoisyClassifier.load(str(file))
    assert first.about["schedule"] == "Flow" and first.about["steps"] == 3
    assert fit_classifier(argv) == 0
    again = NoisyClassifier.load(str(file))  # everything follows from the seed
    assert again.about == first.about
    assert all(value.equal(first.state_dict()[name]) for name, value in again.state_dict().items())

    chosen = ["guidance=classifier", f"guidance.classifier.weights={file}", "guidance.scale=2"]
    guided = configured(*chosen)(Digits(Cosine()), LabelConditioner(10))
    assert guided(torch.zeros(2, 1, 8, 8), torch.tensor(0.5), label=torch.tensor([1, 2])).shape == (2, 1, 8, 8)
    for wrong, word in (
        (["data.num_classes=0"], "no labels"),
        (["out=x.pt"], "safetensors"),
        (["training.max_steps=0"], "at least 1"),
        (["classifier.width=9"], "multiple of 8"),
        (["classifier.wdith=8"], "width"),
    ):
        with pytest.raises(DiffxError, match=word):
            fit_classifier([*argv[:1], *argv[3:], *wrong])


# ----- trained runs as guides


def diffx(*argv):
    """Runs a command in this process."""
    from diffx.cli.main import run

    assert run(list(argv)) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A conditional run of six steps with its checkpoints, and an unconditional one of another schedule."""
    root = tmp_path_factory.mktemp("runs")
    tiny = [f"runs_dir={root}", "backbone=unet_tiny", "data.batch_size=16", "progress_bar=false", "trainer=cpu"]
    asked = ["evaluation.num_samples=0", "evaluation.per_class=1", "sampler.steps=2", "checkpoint.every_n_steps=2"]
    diffx("train", *tiny, *asked, "training.max_steps=6", "optimizer.lr=1e-2", "name=a")
    diffx("train", *tiny, *asked, "training.max_steps=2", "conditioning=none", "schedule=flow", "name=b")
    return tuple(config.parent for name in "ab" for config in root.glob(f"{name}/*/seed0/config.yaml"))


def test_a_guide_is_the_checkpoint_of_its_step(runs):
    from diffx.cli.guides import trained_denoiser
    from diffx.experiment import Run

    run = Run(runs[0])
    final, last, earlier = (trained_denoiser(run, step).state_dict() for step in (None, 6, 4))
    assert all(final[name].equal(last[name]) for name in final)
    assert not all(final[name].equal(earlier[name]) for name in final)
    stored = torch.load(run.checkpoints / "step=00000004.ckpt", weights_only=True)["state_dict"]
    assert all(earlier[name].equal(stored[f"ema.denoiser.{name}"]) for name in earlier)
    with pytest.raises(DiffxError, match=r"step 5, only of 4, 6"):
        trained_denoiser(run, 5)
    before = torch.random.get_rng_state()
    trained_denoiser(run)
    assert torch.random.get_rng_state().equal(before)


def sampled(tmp_path, run, name, *overrides):
    diffx("sample", f"run={run}", "n=4", "sampler.steps=3", *overrides, f"out={tmp_path / name}.npz")
    with np.load(tmp_path / f"{name}.npz") as file:
        return file["arr_0"]


def test_a_run_is_guided_by_its_own_past_and_by_an_unconditional_one(runs, tmp_path):
    own, other = runs
    auto = ["guidance=autoguidance", "guidance.scale=3"]
    plain = sampled(tmp_path, own, "plain")
    past = sampled(tmp_path, own, "past", *auto, f"guidance.run='{own}'", "guidance.step=4")
    weaker = sampled(tmp_path, own, "weaker", *auto, f"guidance.run='{other}'", "guidance.interval=[0.1,5]")
    off = sampled(tmp_path, own, "off", "guidance=autoguidance", "guidance.scale=1", f"guidance.run='{other}'")
    elsewhere = sampled(tmp_path, own, "flow", *auto, f"guidance.run='{own}'", "guidance.step=4", "schedule=flow")
    assert (off == plain).all()
    assert len({a.tobytes() for a in (plain, past, weaker)}) == 3
    # on equal levels of logSNR the sampler, the model and its guide are the same functions on every schedule
    np.testing.assert_allclose(elsewhere.astype(int), past, atol=2)
    stack = ["guidance=stacked", "+guidance@guidance.a=cfg", "+guidance@guidance.b=autoguidance"]
    both = sampled(tmp_path, own, "both", *stack, f"guidance.b.run='{own}'", "guidance.b.step=4", "guidance.a.scale=2")
    assert not (both == past).all()


def test_an_unconditional_guide_is_told_nothing(runs):
    from diffx.cli.guides import autoguidance

    x_t, t = Keys(0, torch.arange(2)).normal("x", 1, 8, 8), torch.tensor(0.6)
    for folder, differs in zip(runs, (True, False), strict=True):
        # at scale 0 it is the guide alone
        guide = autoguidance(Digits(Cosine()), LabelConditioner(10), str(folder), scale=0.0)
        one, other = (guide(x_t, t, label=torch.tensor(label)) for label in ([1, 2], [3, 4]))
        assert torch.equal(one, other) != differs


def test_a_guide_of_other_data_is_refused(runs):
    from diffx.cli.guides import autoguidance

    denoiser, own = Digits(Cosine()), str(runs[0])
    for arguments, word in (
        ((LabelConditioner(10), own, None, "ema", 2.0, None, 0.0, None, [3, 8]), "3x8x8"),
        ((LabelConditioner(7), own), "other classes"),
        ((Unconditional(), own), "other classes"),
        ((LabelConditioner(10), str(runs[0].parent)), "no run directory"),
        ((LabelConditioner(10), own, None, "emma"), "no weights 'emma'"),
    ):
        with pytest.raises(DiffxError, match=word) as refused:
            autoguidance(denoiser, *arguments)
        assert "\n" not in str(refused.value)
