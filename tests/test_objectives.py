"""Objectives beyond the denoising loss: what their gradients train, and what they leave alone."""

import math

import pytest
import torch
from conftest import F64, mixture
from torch import nn

from diffx.denoisers import Denoiser, GaussianMixture, LearnedVariance, Preconditioned
from diffx.likelihood import ContinuousBound, DiscreteBound, bits_per_dim
from diffx.objectives import ELBO, Hybrid
from diffx.parameterizations import Eps, V
from diffx.schedules import Cosine, Learned, Linear, Tabulated
from diffx.time_samplers import TimeSampler, Uniform
from diffx.utils import DiffxError, Keys
from diffx.weightings import SNR, Unit


def data(denoiser, n, seed=3):
    keys = Keys(seed, torch.arange(n))
    return denoiser.sample(keys.normal("x", denoiser.means.shape[1], dtype=F64), keys.uniform("component")), keys


def gaussian(schedule, dimensions=1):
    return GaussianMixture(
        torch.full((1, dimensions), 0.1, dtype=F64), torch.full((1, dimensions), 0.4, dtype=F64), schedule
    )


# ---- the hybrid objective ----

STEPS = 10


class Times(TimeSampler):
    """One time for all."""

    def __init__(self, t):
        self.t = t

    def __call__(self, schedule, keys):
        return torch.full((len(keys),), self.t), torch.ones(len(keys))


class Variance(Denoiser):
    """The exact x̂, and the exact v moved by a parameter."""

    def __init__(self, denoiser):
        super().__init__()
        self.exact, self.schedule = denoiser, denoiser.schedule
        self.shift = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x_t, t, **cond):
        return self.exact(x_t, t, **cond)

    def posterior(self, x_t, t, s, **cond):
        x_hat, v = self.exact.posterior(x_t, t, s, **cond)
        return x_hat, v + self.shift


class Halves(nn.Module):
    """A small network of two outputs per input channel."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x, logsnr):
        return torch.cat([self.mean(x), torch.tanh(self.variance(x))], 1)


def images(n=6):
    keys = Keys(0, torch.arange(n))
    return keys.uniform("images", 3, 2, 2) * 2 - 1, keys


def learned_variance(parameterization=None):
    torch.manual_seed(0)
    return LearnedVariance(Halves(), Cosine(), parameterization or Eps())


@pytest.mark.parametrize("i", [2, 5, 9, 10])
def test_the_bound_is_least_at_the_true_variance(i):
    denoiser = Variance(gaussian(Cosine()))
    x, keys = data(denoiser.exact, 20000)
    objective = Hybrid(Times((i - 0.5) / STEPS), SNR(), STEPS, vlb_weight=1.0, levels=0)
    slopes = []
    for shift in (-0.1, 0.0, 0.1):
        denoiser.shift.data.fill_(shift)
        vlb = objective(denoiser, x, keys)["loss"].reshape(100, -1).mean(1)
        slopes.append(torch.stack([torch.autograd.grad(part, denoiser.shift, retain_graph=True)[0] for part in vlb]))
    below, at, above = slopes
    error = at.std() / 10
    assert at.mean().abs() < 4 * error
    # which would be seen
    assert below.mean() < -10 * error and above.mean() > 10 * error


def test_the_bound_moves_the_variances_alone():
    x, keys = images()
    gradients = {}
    for weight in (0.0, 0.001, 7.0):
        denoiser = learned_variance()
        Hybrid(Uniform(), Unit(), 1000, weight)(denoiser, x, keys)["loss"].mean().backward()
        gradients[weight] = [p.grad for p in denoiser.parameters()]
        assert all(g.isfinite().all() for g in gradients[weight])
    mean, variance = slice(0, 2), slice(2, 4)
    assert all(g.any() for g in gradients[0.0][mean]) and not any(g.any() for g in gradients[0.0][variance])
    for weight in (0.001, 7.0):
        for a, b in zip(gradients[weight][mean], gradients[0.0][mean], strict=True):
            assert a.equal(b)
        assert all(g.any() for g in gradients[weight][variance])
    torch.testing.assert_close(gradients[7.0][2] / 7, gradients[0.001][2] / 0.001, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parameterization", [Eps(), V()])
def test_the_simple_part_is_the_denoising_loss_at_the_steps(parameterization):
    x, keys = images(8)
    denoiser = learned_variance(parameterization)
    terms = Hybrid(Times(0.4996), Unit(), 1000)(denoiser, x, keys)
    alpha, sigma = denoiser.schedule(torch.tensor(0.5))
    z = keys.normal("noise", 3, 2, 2)
    output = denoiser.network(alpha * x + sigma * z, denoiser.coefficients(torch.tensor(0.5)))
    target = z if isinstance(parameterization, Eps) else alpha * z - sigma * x
    torch.testing.assert_close(terms["simple"], (output - target).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.001 * terms["vlb"])
    torch.testing.assert_close(terms["logsnr"], denoiser.schedule.logsnr(torch.full((8,), 0.5)))


def test_the_average_of_all_steps_is_the_bound():
    denoiser = Variance(gaussian(Cosine(), 2))
    x, keys = data(denoiser.exact, 5000)
    vlb = torch.stack(
        [
            Hybrid(Times((i - 0.5) / STEPS), SNR(), STEPS, levels=0)(denoiser, x, keys)["vlb"]
            for i in range(1, STEPS + 1)
        ]
    ).mean(0)
    terms = DiscreteBound(STEPS, None, STEPS - 1, levels=0)(denoiser, x, keys)
    expected = terms["reconstruction"] + terms["diffusion"]
    difference = vlb - expected / (2 * math.log(2))
    assert abs(difference.mean()) < 4.5 * difference.std() / len(x) ** 0.5
    assert difference.std() / len(x) ** 0.5 < 0.05


def test_steps_are_rounded_up_and_all_of_them_are_met():
    x, keys = images(4000)
    found = Hybrid(Uniform(), Unit(), 5)(learned_variance(), x, keys)["logsnr"].unique()
    expected = Cosine().logsnr(torch.arange(1, 6) / 5)
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1e-5, 0.3, 1.0])
def test_the_bound_of_pixels_is_finite_for_any_network(t):
    # black and white pixels, and with ε-prediction estimates of thousands
    keys = images()[1]
    x = keys.uniform("images", 3, 2, 2).round() * 2 - 1
    denoiser = learned_variance()
    terms = Hybrid(Times(t), Unit(), 1000)(denoiser, x, keys)
    terms["loss"].mean().backward()
    assert terms["vlb"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters())


def test_a_model_without_variances_is_refused():
    x, keys = images()
    denoiser = Preconditioned(nn.Identity(), Cosine(), V())
    with pytest.raises(DiffxError, match="denoiser=learned_variance") as refusal:
        Hybrid(Uniform(), Unit())(denoiser, x, keys)
    assert "Preconditioned" in str(refusal.value) and "\n" not in str(refusal.value)


# ---- the bound as an objective ----


@pytest.mark.parametrize(
    "schedule", [Linear(), Tabulated.ddpm(), Learned(hidden=32)], ids=["linear", "ddpm", "learned"]
)
def test_elbo_is_the_bound(schedule):
    denoiser = mixture(schedule.requires_grad_(False))
    x, keys = data(denoiser, 40000)
    # with the whole range of levels linear's estimate varies too much for a test
    terms = ELBO(6.0, levels=0)(denoiser, x, keys)
    bound = ContinuousBound(10, 6.0, levels=0)(denoiser, x[:4000], Keys(9, torch.arange(4000)))
    (a, a_error), (b, b_error) = bits_per_dim(terms["loss"], 2), bits_per_dim(bound["nats"], 2)
    assert abs(a - b) < 4.5 * math.hypot(a_error, b_error)
    assert a_error < 0.1
    torch.testing.assert_close(terms["bpd"], terms["loss"] / (2 * math.log(2)))
    parts = terms["prior"] + terms["reconstruction"] + terms["diffusion"]
    torch.testing.assert_close(terms["loss"], parts)


def test_elbo_trains_a_network_on_pixels():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 1)

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, logsnr):
            return self.network(x)

    denoiser = Preconditioned(Backbone(), Learned(hidden=16), Eps())
    x, keys = images(16)
    terms = ELBO()(denoiser, x, keys)
    assert {name: term.shape for name, term in terms.items()} == dict.fromkeys(
        ("loss", "logsnr", "bpd", "prior", "reconstruction", "diffusion"), (16,)
    )
    terms["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    with torch.no_grad():  # as in validation
        torch.testing.assert_close(ELBO()(denoiser, x, keys)["loss"], terms["loss"].detach())


def test_times_of_a_batch_are_stratified():
    denoiser = mixture(Learned(hidden=16).requires_grad_(False))
    x, keys = data(denoiser, 64)
    t = denoiser.schedule.inverse(ELBO(levels=0)(denoiser, x, keys)["logsnr"])
    cells = (t * 64).floor().long()
    assert cells.tolist() == list(range(64))
