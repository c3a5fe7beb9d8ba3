"""A learned schedule learns what it should: its interior less variance, its ends the bound."""

import math

import pytest
import torch
from conftest import F64, build, keyed_noise, mixture
from torch import nn

from diffx.autoencoders import Pixels
from diffx.denoisers import GaussianMixture, Preconditioned
from diffx.discretizations import Uniform
from diffx.objectives import ELBO, Denoising
from diffx.parameterizations import V
from diffx.samplers import DDIM
from diffx.schedules import Learned, Schedule, Shifted, TimeShift, ZeroSNR
from diffx.time_samplers import Stratified
from diffx.utils import Keys
from diffx.weightings import SNR

ENDS = torch.tensor([0.0, 1.0], dtype=F64)


def data(denoiser, n, seed=3):
    keys = Keys(seed, torch.arange(n))
    return denoiser.sample(keys.normal("x", denoiser.means.shape[1], dtype=F64), keys.uniform("component")), keys


def uneven(**arguments):
    """A schedule that does not start next to its best."""
    schedule = Learned(hidden=16, **arguments)
    with torch.no_grad():
        schedule.height += torch.linspace(1, -1, 16)
    return schedule


def spread(denoiser, n=20000):
    """The variance of the estimate from one sample at a uniform time."""
    x, keys = data(denoiser, n, seed=11)
    objective = ELBO(levels=0)
    # keys of batches of one: no strata
    with torch.no_grad():
        return objective(denoiser, x, Keys(5, keys.index, total=1))["diffusion"].var().item()


def train(denoiser, steps, lr=0.03, n=256):
    objective = ELBO(levels=0)
    optimizer = torch.optim.Adam([p for p in denoiser.schedule.parameters() if p.requires_grad], lr)
    for step in range(steps):
        keys = Keys(1, torch.arange(n) + n * step)
        x = denoiser.sample(keys.normal("x", denoiser.means.shape[1], dtype=F64), keys.uniform("component"))
        optimizer.zero_grad()
        objective(denoiser, x, keys)["loss"].mean().backward()
        optimizer.step()


def test_it_begins_nearly_linear():
    schedule, t = Learned(), torch.linspace(0, 1, 101, dtype=F64)
    assert (schedule.logsnr(t) - (13.3 - 18.3 * t)).abs().max() < 1


@pytest.mark.parametrize("learn_ends", [False, True])
def test_ends_are_those_given(learn_ends):
    schedule = Learned(9.0, -6.0, learn_ends)
    torch.testing.assert_close(schedule.logsnr(ENDS), torch.tensor([9.0, -6.0], dtype=F64), rtol=1e-9, atol=0)
    assert ("gamma_0" in dict(schedule.named_parameters())) == learn_ends


def test_training_lowers_the_variance_and_leaves_the_bound():
    denoiser = mixture(uneven(logsnr_max=8.0))
    times = torch.linspace(0, 1, 9, dtype=F64)
    levels = denoiser.schedule.levels(times)
    before = spread(denoiser)
    x, keys = data(denoiser, 20000, seed=12)
    with torch.no_grad():
        bound = ELBO(levels=0)(denoiser, x, keys)["loss"]
    sampled = DDIM()(denoiser, x[:4], times.flip(0), noise=keyed_noise(torch.arange(4), (2,)))
    train(denoiser, 150)
    after = spread(denoiser)
    assert after < 0.8 * before
    with torch.no_grad():
        trained = ELBO(levels=0)(denoiser, x, keys)["loss"]
    assert abs(bound.mean() - trained.mean()) < 4.5 * math.hypot(bound.std(), trained.std()) / len(x) ** 0.5
    # sampling is on the trained schedule: its interior is another, its ends are not
    moved = denoiser.schedule.levels(times)
    assert all(abs(a.logsnr - b.logsnr) > 0.1 for a, b in zip(moved[1:-1], levels[1:-1], strict=True))
    for k in (0, -1):
        assert moved[k].logsnr == pytest.approx(levels[k].logsnr, abs=1e-9)
    again = DDIM()(denoiser, x[:4], times.flip(0), noise=keyed_noise(torch.arange(4), (2,)))
    assert (again - sampled).abs().max() > 1e-3


def test_training_lowers_the_variance_on_digits():
    # the exact denoiser of digits, a little blurred: that of a network is as uneven over noise levels
    images = build("data", "digits").split("train").get(torch.arange(0, 1437, 28))["x"]
    means = Pixels().encode({"x": images}).flatten(1)
    denoiser = GaussianMixture(means.double(), torch.full_like(means, 0.1).double(), Linear(13.3, -5.0))
    linear = spread(denoiser, 2000)
    denoiser.schedule = Learned(13.3, -5.0, hidden=64)
    train(denoiser, 40, n=64)
    assert spread(denoiser, 2000) < 0.5 * linear


class Linear(Schedule):
    """logSNR linear in the time."""

    def __init__(self, logsnr_max, logsnr_min):
        super().__init__()
        self.logsnr_max, self.logsnr_min = logsnr_max, logsnr_min

    def forward(self, t):
        gamma = -self.logsnr_max + (self.logsnr_max - self.logsnr_min) * t
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def test_the_gradient_of_the_interior_is_that_of_the_variance():
    # Gaussian data: E[L²] is an integral over t of numbers known exactly
    std, dimensions = 0.4, 1
    schedule = uneven(logsnr_max=6.0, logsnr_min=-4.0)
    denoiser = GaussianMixture(
        torch.zeros(1, dimensions, dtype=F64), torch.full((1, dimensions), std, dtype=F64), schedule
    )
    t = ((torch.arange(4000, dtype=F64) + 0.5) / 4000).requires_grad_()
    logsnr = schedule.logsnr(t)
    (slope,) = torch.autograd.grad(logsnr.sum(), t, create_graph=True)
    loss = 0.5 * slope.abs() * logsnr.exp() * std**2 / (1 + std**2 * logsnr.exp())
    square = 3 * loss.square().mean()  # of a Gaussian error the fourth moment is 3
    exact = torch.autograd.grad(square.log(), schedule.interior())
    found = []
    for seed in range(40):
        x, keys = data(denoiser, 4096, seed)
        schedule.zero_grad()
        ELBO(levels=0)(denoiser, x, keys)["loss"].mean().backward()
        found.append(torch.cat([p.grad.double().flatten() for p in schedule.interior()]))
    found, exact = torch.stack(found), torch.cat([g.double().flatten() for g in exact])
    error = found.std(0) / 40**0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 1e-7).all()
    # and it is not lost in the noise
    assert exact.norm() > 5 * error.norm()


def test_the_gradient_of_the_ends_is_that_of_the_bound():
    std = 0.4
    schedule = uneven(logsnr_max=4.0, logsnr_min=1.0, learn_ends=True)
    denoiser = GaussianMixture(torch.zeros(1, 1, dtype=F64), torch.full((1, 1), std, dtype=F64), schedule)
    gamma = torch.tensor([-4.0, -1.0], dtype=F64, requires_grad=True)
    clean, noisy = (-gamma).exp().unbind()
    bound = 0.5 * (noisy * std**2 + torch.log((1 + std**2 * clean) / (1 + std**2 * noisy)) - clean.log())
    (exact,) = torch.autograd.grad(bound, gamma)
    found = []
    for seed in range(40):
        x, keys = data(denoiser, 4096, seed)
        schedule.zero_grad()
        ELBO(levels=0)(denoiser, x, keys)["loss"].mean().backward()
        found.append(torch.stack([schedule.gamma_0.grad, schedule.gamma_1.grad]).double())
    found = torch.stack(found)
    error = found.std(0) / 40**0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error).all()
    assert (exact.abs() > 3 * error).all()


@pytest.mark.parametrize("learn_ends", [False, True])
def test_only_learned_ends_move(learn_ends):
    denoiser = mixture(uneven(logsnr_max=8.0, learn_ends=learn_ends))
    train(denoiser, 10)
    moved = (denoiser.schedule.logsnr(ENDS) - torch.tensor([8.0, -5.0], dtype=F64)).abs()
    assert (moved > 0.05).all() if learn_ends else (moved < 1e-6).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trainable_stays_so(frozen):
    denoiser = mixture(uneven(learn_ends=True).requires_grad_(not frozen))
    x, keys = data(denoiser, 8)
    ELBO(levels=0)(denoiser, x, keys)["loss"].mean().backward()
    for p in denoiser.schedule.parameters():
        assert p.requires_grad != frozen
        assert (p.grad is None) == frozen


@pytest.mark.parametrize("wrapper", [Shifted, TimeShift, ZeroSNR])
def test_a_wrapped_schedule_learns_too(wrapper):
    denoiser = mixture(wrapper(uneven(logsnr_max=8.0)))
    assert denoiser.schedule.interior()
    x, keys = data(denoiser, 64)
    ELBO(levels=0)(denoiser, x, keys)["loss"].mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in denoiser.schedule.interior())


def test_the_denoising_loss_reaches_it_too():
    class Backbone(nn.Module):
        def forward(self, x, logsnr):
            return torch.tanh(x + 0.1 * logsnr[:, None])

    denoiser = Preconditioned(Backbone(), uneven(), V())
    keys = Keys(0, torch.arange(16))
    Denoising(Stratified(), SNR())(denoiser, keys.normal("x", 4), keys)["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in denoiser.schedule.interior())


def test_a_saved_schedule_is_the_trained_one():
    denoiser = mixture(uneven(logsnr_max=8.0))
    train(denoiser, 3)
    fresh = Learned(hidden=16)
    fresh.load_state_dict(denoiser.schedule.state_dict())
    t = Uniform()(fresh, 7)
    assert fresh.logsnr(t).equal(denoiser.schedule.logsnr(t))
