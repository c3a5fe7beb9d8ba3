"""Bounds and flows against closed forms: data whose likelihood is known leave no room for a wrong constant."""

import math

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, mixture
from scipy import integrate, stats

from diffx.denoisers import GaussianMixture
from diffx.likelihood import ContinuousBound, DiscreteBound, ProbabilityFlow, bits_per_dim, gaussian_nats
from diffx.schedules import EDM, Cosine, Flow, Linear
from diffx.utils import Keys

STD, D = 0.4, 3


def frozen(choice):
    fewer = {"hidden": 64} if choice == "learned" else {}  # only faster
    return build("schedule", choice, **fewer).requires_grad_(False)


def gaussian(schedule, std=STD, dimensions=D):
    """Data N(0, std²) in some dimensions."""
    return GaussianMixture(torch.zeros(1, dimensions, dtype=F64), torch.full((1, dimensions), std, dtype=F64), schedule)


def data(denoiser, n, seed=7):
    keys = Keys(seed, torch.arange(n))
    return denoiser.sample(keys.normal("x", denoiser.means.shape[1], dtype=F64), keys.uniform("component")), keys


def close(values, expected, errors=4.5, most=math.inf):
    """Whether a mean is the expected one within its standard error, which itself is at most `most`."""
    error = values.std().item() / len(values) ** 0.5
    assert error <= most
    assert values.mean().item() == pytest.approx(expected, abs=errors * error + 1e-9)


# ---- the Gaussian of a cell ----


def test_the_cells_of_a_gaussian_have_its_mass():
    values = torch.linspace(-1, 1, 256, dtype=F64)
    for mean, std in [(0.0, 0.3), (0.9, 0.004), (-3.0, 0.1), (0.1234, 1e-3), (0.5, 5.0)]:
        nats = gaussian_nats(values[:, None], torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), 256)
        assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-9)


def test_the_cell_of_a_gaussian_by_scipy():
    x = torch.tensor([[0.3], [0.0], [-0.5]], dtype=F64)
    mean, std = 0.31, 0.02
    upper, lower = (stats.norm.cdf(x.numpy(), mean + shift, std) for shift in (-1 / 255, 1 / 255))
    nats = gaussian_nats(x, torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), 256)
    np.testing.assert_allclose(nats[:1], -np.log((upper - lower)[:1, 0]), rtol=1e-9)
    density = gaussian_nats(x, torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), 0)
    np.testing.assert_allclose(density, -stats.norm.logpdf(x[:, 0].numpy(), mean, std), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_from_its_cell_a_gaussian_is_finite_and_has_a_gradient(dtype):
    x = torch.tensor([[-1.0], [-1.0], [1.0], [0.0], [0.0], [-1.0], [1.0], [-1.0], [0.1]], dtype=dtype)
    mean = torch.tensor(
        [[1.0], [-1.0], [-1.0], [0.2], [0.0], [900.0], [900.0], [-900.0], [900.0]], dtype=dtype, requires_grad=True
    )
    log_std = torch.full((), math.log(1e-2), dtype=dtype, requires_grad=True)
    nats = gaussian_nats(x, mean, log_std.exp(), 256)
    nats.sum().backward()
    assert nats.isfinite().all() and mean.grad.isfinite().all() and log_std.grad.isfinite()
    assert nats[0] > 1000 and nats[1] < 1.1


def test_bits_per_dim_and_its_error():
    nats = torch.tensor([1.0, 2.0, 3.0, 6.0]) * math.log(2) * 5
    mean, error = bits_per_dim(nats, 5)
    assert mean == pytest.approx(3)
    assert error == pytest.approx(torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item() / 2)


# ---- the bound of T steps ----

STEPS = 20


def levels_of(schedule):
    """α_i and σ_i of i = 0 … T as numpy arrays."""
    return tuple(c.detach().numpy() for c in schedule(torch.arange(STEPS + 1, dtype=F64) / STEPS))


def variance_given(alpha, sigma):
    """Var[x | x_t]."""
    return STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)


def steps_in_closed_form(schedule, v):
    """The expected KL of each step i ≥ 2, from the two Gaussians' means and variances."""
    alpha, sigma = levels_of(schedule)
    terms = []
    for i in range(2, STEPS + 1):
        beta = sigma[i] ** 2 - (alpha[i] / alpha[i - 1] * sigma[i - 1]) ** 2
        smaller = beta * sigma[i - 1] ** 2 / sigma[i] ** 2
        reverse = beta**v * smaller ** (1 - v)
        apart = (alpha[i - 1] * beta / sigma[i] ** 2) ** 2 * variance_given(alpha[i], sigma[i])
        terms.append(0.5 * (np.log(reverse / smaller) + smaller / reverse - 1 + apart / reverse))
    return D * sum(terms)


def decoder_in_closed_form(schedule, v, levels):
    alpha, sigma = levels_of(schedule)
    beta_2 = sigma[2] ** 2 - (alpha[2] / alpha[1] * sigma[1]) ** 2
    std = (sigma[1] ** (2 * v) * (beta_2 * sigma[1] ** 2 / sigma[2] ** 2) ** (1 - v)) ** 0.5
    spread = variance_given(alpha[1], sigma[1]) ** 0.5
    if levels == 0:
        return D * (0.5 * np.log(2 * np.pi * std**2) + 0.5 * (spread / std) ** 2)
    half = 1 / (levels - 1)

    def integrand(r):
        mass = stats.norm.cdf((r + half) / std) - stats.norm.cdf((r - half) / std)
        return -stats.norm.pdf(r, 0, spread) * np.log(mass)

    return D * integrate.quad(integrand, -5 * spread, 5 * spread, epsabs=1e-10)[0]


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), EDM(2.0)], ids=["cosine", "linear", "edm"])
@pytest.mark.parametrize("v", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("levels", [0, 32])
def test_the_bound_of_a_gaussian_in_steps(schedule, v, levels):
    denoiser = gaussian(schedule)
    x, keys = data(denoiser, 3000)
    # every step of every sample; the few outermost values of 32 levels are cut off
    terms = DiscreteBound(STEPS, v, STEPS - 1, levels)(denoiser, x, keys)
    close(terms["diffusion"], steps_in_closed_form(schedule, v), most=0.2)
    inside = x.abs().amax(1) < 1 - 1 / 31 if levels else torch.ones(len(x), dtype=torch.bool)
    close(terms["reconstruction"][inside], decoder_in_closed_form(schedule, v, levels), most=0.2)
    end = schedule.logsnr(torch.ones((), dtype=F64)).exp().item()
    close(terms["prior"], 0.5 * D * end * STD**2)
    torch.testing.assert_close(terms["nats"], terms["prior"] + terms["reconstruction"] + terms["diffusion"])


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), EDM(2.0)], ids=["cosine", "flow", "edm"])
def test_with_the_exact_variances_the_steps_are_the_information_lost(schedule):
    # KL of step i = I(x; x_{i−1}) − I(x; x_i), which telescopes: no other variance is better
    denoiser = gaussian(schedule)
    x, keys = data(denoiser, 2000)
    found = DiscreteBound(STEPS, None, STEPS - 1, 0)(denoiser, x, keys)["diffusion"]
    alpha, sigma = levels_of(schedule)
    information = [0.5 * D * np.log1p((STD * alpha[i] / sigma[i]) ** 2) for i in (1, STEPS)]
    close(found, information[0] - information[1], most=0.2)
    assert all(steps_in_closed_form(schedule, v) > found.mean() + 0.05 for v in (0.0, 1.0))


def test_few_draws_of_many_steps_are_unbiased():
    denoiser = gaussian(Cosine())
    x, keys = data(denoiser, 3000)
    close(DiscreteBound(STEPS, 1.0, 3, 0)(denoiser, x, keys)["diffusion"], steps_in_closed_form(Cosine(), 1.0))


# ---- the bound in continuous time ----


def ends_of(bound, schedule):
    ends = schedule.logsnr(torch.tensor([0.0, 1.0], dtype=F64)).clamp(max=bound.logsnr_max)
    return ends.exp().tolist()


@pytest.mark.parametrize("choice", choices("schedule"))
def test_the_continuous_bound_of_a_gaussian(choice):
    schedule, bound = frozen(choice), ContinuousBound(8, levels=0)
    denoiser = gaussian(schedule)
    x, keys = data(denoiser, 1500)
    terms = bound(denoiser, x, keys)
    clean, noisy = ends_of(bound, schedule)
    # I-MMSE: half the integral of Var[x | x_t] over SNR
    diffusion = 0.5 * D * math.log((1 + STD**2 * clean) / (1 + STD**2 * noisy))
    close(terms["diffusion"], diffusion, most=0.05 * diffusion)
    close(terms["reconstruction"], 0.5 * D * math.log(2 * math.pi * math.e / clean))
    close(terms["prior"], 0.5 * D * noisy * STD**2)
    close(terms["nats"] - terms["prior"] - terms["diffusion"] - terms["reconstruction"], 0)
    # a bound of the entropy, and a tight one
    entropy = 0.5 * D * math.log(2 * math.pi * math.e * STD**2)
    total = diffusion + 0.5 * D * (math.log(2 * math.pi * math.e / clean) + noisy * STD**2)
    assert entropy < total < entropy + 0.01


def test_the_interior_of_the_schedule_does_not_matter():
    linear = Linear()
    # ᾱ(1) of the linear one
    cosine = Cosine(alpha_bar_min=(linear(torch.ones((), dtype=F64))[0] ** 2).item())
    found = []
    for seed, schedule in enumerate((cosine, linear)):
        denoiser = mixture(schedule)
        x, _ = data(denoiser, 4000, seed)
        keys = Keys(seed, torch.arange(4000))
        found.append(bits_per_dim(ContinuousBound(40, levels=0)(denoiser, x, keys)["nats"], 2))
    (a, a_error), (b, b_error) = found
    assert abs(a - b) < 4 * math.hypot(a_error, b_error)
    assert max(a_error, b_error) < 0.035


def test_a_bound_is_no_less_than_the_truth_and_near_it():
    denoiser = mixture(Cosine())
    x, keys = data(denoiser, 4000)
    nats = ContinuousBound(40, levels=0)(denoiser, x, keys)["nats"]
    close(nats + denoiser.log_prob(x, torch.zeros((), dtype=F64)), 0, most=0.06)


def test_pixels_cost_what_their_cells_do():
    # the exact denoiser of data at 0: the cell is certain, and nothing else costs
    denoiser = gaussian(Cosine(), std=0.0)
    x, keys = data(denoiser, 50)
    terms = ContinuousBound(4)(denoiser, x, keys)
    assert terms["diffusion"].abs().max() < 1e-12 and terms["prior"].abs().max() < 1e-12
    # the cells reach three standard deviations of x_0 far
    assert terms["reconstruction"].min() >= 0 and terms["reconstruction"].mean() < 0.05 * D


# ---- the flow ----


# one of each kind: they enter by their scale and their ends alone
@pytest.mark.parametrize("choice", ["linear", "edm", "sub_vp", "gvp", "learned"])
def test_the_flow_has_the_density_of_a_mixture_in_one_dimension(choice):
    # in one dimension any probe gives the divergence itself
    denoiser = GaussianMixture(
        torch.tensor([[-0.5], [0.6]], dtype=F64), torch.tensor([[0.1], [0.2]], dtype=F64), frozen(choice)
    )
    x = torch.linspace(-0.9, 1.2, 12, dtype=F64)[:, None]
    flow = ProbabilityFlow(levels=0, rtol=1e-6, atol=1e-6)
    nats = flow(denoiser, x, Keys(0, torch.arange(12)))["nats"]
    tail = math.sqrt(ends_of(flow, denoiser.schedule)[1])  # the start is not quite N(0, σ²)
    torch.testing.assert_close(-nats, start_density(flow, denoiser, x), rtol=0, atol=2e-4 + 5 * tail)


def start_density(flow, denoiser, x):
    """The log-density of x + ρ·z at the level where the flow starts."""
    logsnr = min(flow.logsnr_max, denoiser.schedule.logsnr(torch.zeros((), dtype=F64)).item())
    t = denoiser.schedule.inverse(torch.tensor(logsnr, dtype=F64))
    alpha, _ = denoiser.schedule(t)
    return denoiser.log_prob(alpha * x, t) + x.shape[1] * alpha.log()


def test_the_flow_has_the_density_of_a_mixture_within_its_error():
    denoiser = mixture(Flow())
    x, keys = data(denoiser, 40)
    flow = ProbabilityFlow(probes=20, levels=0, rtol=1e-4, atol=1e-4)
    out = flow(denoiser, x, keys)
    exact = start_density(flow, denoiser, x)
    assert 1e-3 < out["probe_error"].median() < 0.1
    z = (out["nats"] + exact) / (out["probe_error"] + 1e-3)
    assert z.abs().max() < 4.5
    assert z.square().mean().sqrt() < 1.5
    mean, error = bits_per_dim(out["nats"] + exact, 2)
    assert abs(mean) < 4 * error and error < 0.05


def test_the_flow_of_dequantized_data():
    denoiser = gaussian(Flow(), std=0.3)
    x, keys = data(denoiser, 2000)
    nats = ProbabilityFlow(levels=256)(denoiser, x, keys)["nats"]
    width = 2 / 255
    # −E log N(x + u; 0, 0.3²) with u uniform over a cell, less the cell's logarithm
    expected = 0.5 * math.log(2 * math.pi * 0.09) + 0.5 * (1 + width**2 / 12 / 0.09) - math.log(width)
    close(nats, D * expected, most=0.1)


def test_likelihoods_of_images_need_no_autograd_of_the_caller():
    class Pixelwise(GaussianMixture):
        def forward(self, x_t, t, **cond):
            t = t if t.ndim == 0 else t.repeat_interleave(x_t[0].numel())
            return super().forward(x_t.reshape(-1, 1), t).reshape(x_t.shape)

    denoiser = Pixelwise(torch.zeros(1, 1), torch.full((1, 1), 0.3), Cosine())
    keys = Keys(0, torch.arange(4))
    x = 0.3 * keys.normal("x", 3, 2, 2)
    for likelihood in (DiscreteBound(10, 0.0, 2), ContinuousBound(2), ProbabilityFlow(1)):
        with torch.no_grad():
            whole = likelihood(denoiser, x, keys)
        part = likelihood(denoiser, x[2:3], Keys(0, torch.tensor([2])))
        for name, value in whole.items():
            assert value.shape == (4,) and value.dtype == torch.float32
            if name != "probe_error":
                assert value.isfinite().all()
        # the solver's steps are chosen for a batch as a whole
        torch.testing.assert_close(part["nats"], whole["nats"][2:3], rtol=1e-3, atol=1e-3)
