"""The samplers against k-diffusion's: the same denoiser, noise levels and noise give the same samples.

k-diffusion works with α = 1, diffx's `EDM` schedule. Its samplers are plain loops over a tensor of σ, here of diffx's
grids in float64, so that the formulas alone are compared, to eight digits (its σ_down, a difference, loses some).
Where k-diffusion follows another formula, the difference is computed.
"""

import importlib
import importlib.util
import itertools
import sys
import types

import pytest
import torch
from conftest import F64, mixture, no_noise

from diffx.discretizations import Karras, LogSNR
from diffx.samplers import DDIM, LMS, DPMSolver2, DPMSolver3, DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3M, EDMHeun
from diffx.schedules import EDM
from diffx.utils import Keys

B, SIGMA_MAX = 6, 200.0
"""Churning raises σ above 80, the first of the grids."""


def kdiffusion():
    """k_diffusion.sampling alone: the package itself imports CLIP, kornia and more, which no sampler needs."""
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


K = kdiffusion()
DENOISER = mixture(EDM(SIGMA_MAX))


def model(x, sigma):
    return DENOISER(x, sigma / SIGMA_MAX)


def noise(step, draw=0):
    return Keys(0, torch.arange(B), step).normal("noise", 2, dtype=F64)


def noises():
    """The noise of the next step at each call, whatever it is called with."""
    steps = iter(range(1000))
    return lambda *_: noise(next(steps))


def grid(steps, discretization=None, stop=0.0):
    """The same grid as times and as σ."""
    start = 80 / SIGMA_MAX
    times = (discretization or Karras())(DENOISER.schedule, steps, start, stop / SIGMA_MAX)
    return times, times * SIGMA_MAX


def start():
    return 80 * Keys(1, torch.arange(B)).normal("x", 2, dtype=F64)


def agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_the_grids():
    # to float32, in which k-diffusion computes them
    for ours, theirs in (
        (Karras(sigma_min=0.02, sigma_max=70.0), K.get_sigmas_karras(10, 0.02, 70.0)),
        (LogSNR(sigma_min=0.02, sigma_max=70.0), K.get_sigmas_exponential(10, 0.02, 70.0)),
    ):
        torch.testing.assert_close(ours(EDM(), 10) * 80, theirs.double(), rtol=1e-5, atol=0)


every_grid = pytest.mark.parametrize("discretization", [Karras(), LogSNR()])


@every_grid
@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@pytest.mark.parametrize(
    ("name", "sampler"),
    [("euler", DDIM()), ("heun", EDMHeun()), ("dpm_2", DPMSolver2()), ("dpmpp_2m", DPMSolverPP2M())],
)
def test_deterministic_samplers(name, sampler, steps, discretization):
    times, sigmas = grid(steps, discretization)
    theirs = getattr(K, f"sample_{name}")(model, start(), sigmas, disable=True)
    agree(sampler(DENOISER, start(), times, noise=no_noise), theirs)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order):
    # not to the clean end: there k-diffusion extrapolates ε̂ to σ = 0, where x̂ is known to be the answer
    times, sigmas = grid(12, stop=0.002)
    theirs = K.sample_lms(model, start(), sigmas, disable=True, order=order)
    agree(LMS(order)(DENOISER, start(), times, noise=no_noise), theirs)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(
    ("s_churn", "s_tmin", "s_tmax", "s_noise"), [(40, 0.0, float("inf"), 1.0), (5, 0.05, 50, 1.01)]
)
def test_heun_with_churn(monkeypatch, steps, s_churn, s_tmin, s_tmax, s_noise):
    times, sigmas = grid(steps)
    monkeypatch.setattr(torch, "randn_like", noises())
    theirs = K.sample_heun(
        model, start(), sigmas, disable=True, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise
    )
    agree(EDMHeun(s_churn, s_tmin, s_tmax, s_noise)(DENOISER, start(), times, noise=noise), theirs)


@every_grid
@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("steps", [2, 5, 18])  # its dpmpp_2m_sde has no way of a single step
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("euler_ancestral", DDIM),
        ("dpm_2_ancestral", lambda eta: DPMSolver2(eta=eta)),
        ("dpmpp_2s_ancestral", lambda eta: DPMSolverPP2S(eta=eta)),
        ("dpmpp_2m_sde", DPMSolverPP2M),
    ],
)
def test_stochastic_samplers(name, sampler, steps, eta, discretization):
    times, sigmas = grid(steps, discretization)
    theirs = getattr(K, f"sample_{name}")(model, start(), sigmas, disable=True, eta=eta, noise_sampler=noises())
    agree(sampler(eta)(DENOISER, start(), times, noise=noise), theirs)


@pytest.mark.parametrize(
    ("sampler", "step"), [(DPMSolver2(), "dpm_solver_2_step"), (DPMSolver3(), "dpm_solver_3_step")]
)
def test_single_steps_of_dpm_solver(sampler, step):
    times, sigmas = grid(6, LogSNR(), stop=0.01)
    solver, x = K.DPMSolver(model), start()
    for t, s in itertools.pairwise(sigmas):
        x, _ = getattr(solver, step)(x, solver.t(t), solver.t(s))
    agree(sampler(DENOISER, start(), times, noise=no_noise), x)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("curvature", [0.0, 0.3])
def test_dpmpp_3m_sde_but_for_half_of_the_curvature(eta, curvature):
    # With x̂ a parabola in λ = −log σ, the integral of a step of h asks for −φ₃·h²·x̂″, φ₃ = ((e^{−a} − 1)/a + 1)/a − 1/2
    # and a = (1 + η)·h. k-diffusion's d2 = (d1_0 − d1_1)/(r0 + r1) is h²·x̂″/2: the divided difference, without its 2!.
    times, sigmas = grid(10)
    slope = torch.tensor([[0.5, -0.2]], dtype=F64)

    def parabola(x, sigma):
        lam = -torch.as_tensor(sigma, dtype=F64).log().reshape(-1, 1)
        return (slope * lam + curvature * lam**2).expand_as(x)

    class Parabola(type(DENOISER)):
        def forward(self, x_t, t, **cond):
            return parabola(x_t, t * SIGMA_MAX)

    denoiser = Parabola(DENOISER.means, DENOISER.stds, DENOISER.schedule)
    stopped = sigmas[:-1]
    theirs = K.sample_dpmpp_3m_sde(parabola, start(), stopped, disable=True, eta=eta, noise_sampler=noises())
    ours = DPMSolverPP3M(eta)(denoiser, start(), times[:-1], noise=noise)
    missing = torch.zeros((), dtype=F64)
    for k in range(len(stopped) - 1):
        h = (stopped[k] / stopped[k + 1]).log()
        a = (1 + eta) * h
        phi_3 = (torch.expm1(-a) / a + 1) / a - 0.5
        # from the third step on a parabola is known
        missing = torch.exp(-a) * missing - (phi_3 * h**2 * (2 * curvature) / 2 if k >= 2 else 0)
    agree(ours, theirs + missing)
    assert (missing.abs() > 1e-3) == (curvature > 0)
    # to the clean end both give x̂
    agree(
        DPMSolverPP3M(eta)(denoiser, start(), times, noise=noise),
        K.sample_dpmpp_3m_sde(parabola, start(), sigmas, disable=True, eta=eta, noise_sampler=noises()),
    )
