"""Every sampler converges as it declares: to the exact solution, or to the exact distribution.

Data whose denoiser is known exactly (a Gaussian, a mixture) leave no other error than the solver's. The
probability-flow ODE has one solution in y = x/α as a function of ρ = σ/α whatever the schedule, dy/d log ρ = y − x̂,
which is where the reference comes from, so that no schedule's slopes enter into it. Every sampler meets every schedule
and every discretization, and these each other, but not all three in every combination.
"""

import ast
import itertools
import math
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, each, gaussian, in_pairs, is_stochastic, keyed_noise, mixture, no_noise
from scipy import stats
from scipy.integrate import quad, solve_ivp

from diffx.denoisers import Denoiser, GaussianMixture
from diffx.discretizations import Karras, LogSNR, Uniform
from diffx.samplers import (
    DDIM,
    DDPM,
    Adaptive,
    Counted,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    EDMHeun,
    Euler,
    Heun,
    PredictorCorrector,
    UniPC,
)
from diffx.samplers.base import sqrt
from diffx.samplers.phi import moments, phi, weights
from diffx.schedules import EDM, Cosine, Flow, Linear
from diffx.utils import DiffxError, Keys

START, STOP = 0.9, 0.1
"""Where orders are measured: away from the ends."""
STEPS = (80, 160)
"""Divisors of 800, so that the integer grid is even between them."""

DETERMINISTIC = [choice for choice in choices("sampler") if not is_stochastic(build("sampler", choice))]
STOCHASTIC = [choice for choice in choices("sampler") if choice not in DETERMINISTIC]
# beside the YAML files as they are, other members of their families
MORE_DETERMINISTIC = [
    "deis order=1",
    "deis order=2",
    "deis order=4",
    "deis_log_rho order=2",
    "lms order=2",
    "dpm_solver_2 r=1.0",
    "dpmpp_2s r=1.0",
    "unipc order=1",
    "unipc order=2",
    "unipc order=2 b=1",
]
MORE_STOCHASTIC = ["ddpm v=0.5", "ddpm v=1.0", "ddim eta=0.5", "dpmpp_2m eta=0.5", "dpm_solver_2 eta=0.5"]
ALL = [*DETERMINISTIC, *STOCHASTIC, *MORE_DETERMINISTIC, *MORE_STOCHASTIC]
# orders that these reach once their first steps, which know too little, are out of the way
BEYOND_THE_START = {"deis": 3, "deis order=4": 4, "deis_log_rho": 3, "dpmpp_3m": 3, "lms": 4, "unipc": 4}


def built(sampler, **overrides):
    """The sampler of "choice key=value …"."""
    choice, *changes = sampler.split()
    changes = {key: ast.literal_eval(value) for key, value in (change.split("=") for change in changes)}
    return build("sampler", choice, **{**changes, **overrides})


def turns(*families):
    """Combinations in which every choice occurs at least once."""
    return [
        tuple(family[i % len(family)] for family in families) for i in range(max(len(family) for family in families))
    ]


SCHEDULES = [name for name in choices("schedule") if name != "flow_clipped"]  # flow with another end
# times learned for one number of steps are no grid to refine
DISCRETIZATIONS = [choice for choice in choices("discretization") if choice != "learned"]
every_sampler = pytest.mark.parametrize("sampler", ALL)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_pairs_are_all_pairs():
    for families in (
        [DETERMINISTIC, SCHEDULES, DISCRETIZATIONS],
        [ALL, SCHEDULES, DISCRETIZATIONS, ["float32", "float64"]],
        ["abc", "defghij", "kl"],
    ):
        rows = in_pairs(*families)
        assert len(rows) < math.prod(len(family) for family in families)
        for i, j in itertools.combinations(range(len(families)), 2):
            assert {(row[i], row[j]) for row in rows} == set(itertools.product(families[i], families[j]))


def levels_at(schedule, t):
    """α and σ as numbers."""
    return tuple(c.item() for c in schedule(torch.tensor(t, dtype=F64)))


# ---- the order on the probability-flow ODE ----


def solve(denoiser_of, schedule, x, start=START, stop=STOP):
    """The ODE's solution at `stop` to twelve digits, through an interface that knows ρ only."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels_at(schedule, start), levels_at(schedule, stop)
    # on the flow schedule t/(1 − t) = ρ, and x_t = y/(1 + ρ)
    denoiser = denoiser_of(Flow())

    def slope(log_rho, y):
        rho, y = np.exp(log_rho), torch.from_numpy(y).reshape(x.shape)
        return (y - denoiser(y / (1 + rho), torch.tensor(rho / (1 + rho), dtype=F64))).flatten().numpy()

    span = (np.log(sigma_t / alpha_t), np.log(sigma_s / alpha_s))
    y = solve_ivp(slope, span, (x / alpha_t).flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return alpha_s * torch.from_numpy(y).reshape(x.shape)


def noisy(denoiser, n, t):
    """n samples of x_t."""
    keys = Keys(0, torch.arange(n))
    x = denoiser.sample(keys.normal("x", denoiser.means.shape[1], dtype=F64), keys.uniform("component"))
    alpha, sigma = levels_at(denoiser.schedule, t)
    return alpha * x + sigma * keys.normal("z", x.shape[1], dtype=F64)


@lru_cache
def problem(schedule):
    """A denoiser, samples at `START`, and the exact ones at `STOP`."""
    # with σ = 80·t, x̂ would hardly change between those times
    denoiser = mixture(build("schedule", schedule, **({"sigma_max": 5.0} if schedule == "edm" else {})))
    x = noisy(denoiser, 8, START)
    return denoiser, x, solve(mixture, denoiser.schedule, x)


def closed_form(denoiser, x, t, s):
    """The probability-flow map of a Gaussian: the quantiles stay."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels_at(denoiser.schedule, t), levels_at(denoiser.schedule, s)
    mean, std = denoiser.means[0], denoiser.stds[0]
    spread_t, spread_s = ((alpha_t * std) ** 2 + sigma_t**2).sqrt(), ((alpha_s * std) ** 2 + sigma_s**2).sqrt()
    return alpha_s * mean + spread_s / spread_t * (x - alpha_t * mean)


@each("schedule")
def test_the_reference_is_the_closed_form_where_there_is_one(schedule):
    denoiser_of = partial(gaussian, mean=0.4, std=0.6)
    denoiser = denoiser_of(build("schedule", schedule))
    x = noisy(denoiser, 4, START)
    expected = closed_form(denoiser, x, START, STOP)
    torch.testing.assert_close(solve(denoiser_of, denoiser.schedule, x), expected, rtol=1e-9, atol=1e-10)


def slope_of(errors, steps):
    """The exponent p of error ∝ steps^−p, by least squares."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def unlimited(sampler):
    """The sampler; an adaptive one with no limit to its error, which then takes the grid's steps."""
    sampler = built(sampler)
    return Adaptive(rtol=1e9, atol=1e9, h_first=1e9) if sampler.evaluations is None else sampler


def error(out, exact):
    return (out - exact).square().mean().sqrt().item()


def is_smooth(times):
    """Whether each step is about as long as the one before: rounding to integers may prevent it."""
    lengths = -times.diff()
    return (lengths[1:] / lengths[:-1]).log().abs().max() < 8 / len(lengths)


@pytest.mark.parametrize(
    ("sampler", "schedule", "discretization"),
    [
        *in_pairs(DETERMINISTIC, SCHEDULES, DISCRETIZATIONS),
        *turns(MORE_DETERMINISTIC, SCHEDULES, DISCRETIZATIONS),
    ],
)
def test_measured_order_is_the_declared_one(schedule, discretization, sampler):
    denoiser, x, exact = problem(schedule)
    solver = unlimited(sampler)
    # the adaptive one looks up the time of every estimate, and needs few
    steps = STEPS if sampler != "adaptive" else (40, 80)
    grids = [build("discretization", discretization)(denoiser.schedule, k, START, STOP) for k in steps]
    errors = [error(solver(denoiser, x, times, noise=no_noise), exact) for times in grids]
    # the longest step is what the error follows where steps are uneven
    slope = slope_of(errors, [1 / denoiser.schedule.logsnr(times).diff().max().item() for times in grids])
    smooth = is_smooth(grids[-1])
    assert slope > solver.order - 0.3 or (sampler == "pndm" and not smooth)
    # an order never reached is as wrong a declaration, unless it is the start's alone
    assert slope < solver.order + 0.3 or sampler in BEYOND_THE_START or not smooth
    assert errors[-1] < 0.05


@pytest.mark.parametrize("discretization", ["logsnr", "uniform"])
@pytest.mark.parametrize("sampler", list(BEYOND_THE_START))
def test_the_order_beyond_the_start(sampler, discretization):
    # the first steps' results are replaced by the exact solution: what is left is the multistep formula
    denoiser, x, exact = problem("flow")
    solver, order, errors = built(sampler), BEYOND_THE_START[sampler], []
    for k in (200, 400):
        times = build("discretization", discretization)(denoiser.schedule, k, START, STOP)
        x_t, levels = x, denoiser.schedule.levels(times)
        state = solver.init(denoiser, levels)
        for i in range(k):
            x_t, state = solver.step(denoiser, x_t, levels[i], levels[i + 1], state, noise=no_noise)
            if i < order - 1:
                if hasattr(state, "x"):  # a corrector starts from its own result, at the level before
                    state = state._replace(x=solve(mixture, denoiser.schedule, x, stop=times[i].item()) if i else x)
                x_t = solve(mixture, denoiser.schedule, x, stop=times[i + 1].item())
        errors.append(error(x_t, exact))
    assert slope_of(errors, (200, 400)) == pytest.approx(order, abs=0.3)


def test_the_order_can_be_missed():
    class Off(DPMSolverPP2M):  # the estimate before, taken at the wrong level
        def step(self, denoiser, x_t, t, s, state, **arguments):
            state = state and state._replace(logsnr=state.logsnr - 0.1 * (t.logsnr - state.logsnr))
            return super().step(denoiser, x_t, t, s, state, **arguments)

    denoiser, x, exact = problem("cosine")
    errors = [error(Off()(denoiser, x, Uniform()(None, k, START, STOP), noise=no_noise), exact) for k in STEPS]
    assert slope_of(errors, STEPS) < 1.5


@pytest.mark.parametrize(("sampler", "schedule"), turns([*DETERMINISTIC, *MORE_DETERMINISTIC], SCHEDULES))
def test_the_whole_way_to_the_clean_end_converges(schedule, sampler):
    denoiser, sampler = gaussian(build("schedule", schedule), 0.4, 0.6), unlimited(sampler)
    grid = build("discretization", "karras", sigma_max=50.0)
    start = grid(denoiser.schedule, 4)[0].item()
    x = noisy(denoiser, 16, start)
    exact = closed_form(denoiser, x, start, 0.0)
    steps = (32, 64, 128)
    errors = [(sampler(denoiser, x, grid(denoiser.schedule, k), noise=no_noise) - exact).abs().max() for k in steps]
    assert errors[-1] < 1e-5 or slope_of(errors, steps) > sampler.order - 0.3
    assert errors[-1] < (0.15 if sampler.order == 1 else 0.005)


# ---- the functions that the solvers share ----


@pytest.mark.parametrize("h", [-9.0, -1.0001, -0.9999, -1e-3, 0.0, 1e-6, 0.3, 0.9999, 1.0001, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k, h):
    exact = quad(lambda u: math.exp((1 - u) * h) * u ** (k - 1) / math.factorial(k - 1), 0, 1, epsabs=0, epsrel=1e-13)[
        0
    ]
    assert phi(k, h) == pytest.approx(exact, rel=1e-12)
    assert phi(k, torch.tensor([h, 0.2], dtype=F64))[0].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("nodes", [[0.0], [0.0, -0.7], [0.0, -1.3, -1.9], [0.0, -1.0, -2.5, 1.0]])
@pytest.mark.parametrize("h", [0.01, 2.0])
def test_weights_integrate_polynomials_exactly(nodes, h):
    w = weights(nodes, moments(h, len(nodes)))
    for degree in range(len(nodes)):
        exact = quad(lambda u, d=degree: h * math.exp((u - 1) * h) * u**d, 0, 1, epsabs=0, epsrel=1e-12)[0]
        assert sum(a * u**degree for a, u in zip(w, nodes, strict=True)) == pytest.approx(exact, rel=1e-9)


# ---- steps that the error chooses ----


def adaptive_run(schedule, tolerance, steps=1, n=8, stop=STOP):
    denoiser = Counted(problem(schedule)[0])
    x = noisy(denoiser.denoiser, n, START)
    times = Uniform()(denoiser.schedule, steps, START, stop)
    return denoiser, x, Adaptive(rtol=tolerance, atol=tolerance)(denoiser, x, times, noise=no_noise)


@pytest.mark.parametrize("schedule", ["cosine", "ve"])  # on all others the steps are the same, see below
def test_the_error_follows_the_tolerance(schedule):
    exact = problem(schedule)[2]
    calls, errors = [], []
    for tolerance in (1e-1, 1e-3, 1e-5):
        denoiser, _, out = adaptive_run(schedule, tolerance)
        calls.append(denoiser.calls)
        errors.append((out - exact).abs().max().item() / exact.abs().max().item())
        assert errors[-1] < 10 * tolerance
    # at third order a hundredth of the error takes up to 100^(1/3) = 4.6 times the steps
    assert 1.5 < calls[1] / calls[0] < 5 and 2 < calls[2] / calls[1] < 5


def test_the_steps_are_each_samples_own():
    denoiser, x, out = adaptive_run("cosine", 1e-4, n=8)
    costs = []
    for k in range(8):
        alone = Counted(denoiser.denoiser)
        again = Adaptive(rtol=1e-4, atol=1e-4)(alone, x[k : k + 1], Uniform()(None, 1, START, STOP), noise=no_noise)
        torch.testing.assert_close(again, out[k : k + 1], rtol=1e-12, atol=1e-12)
        costs.append(alone.calls)
    assert min(costs) < max(costs)
    # samples that are done cost nothing
    assert denoiser.samples == sum(costs) and denoiser.calls == max(costs)


def test_a_finer_grid_costs_little_where_the_error_rules():
    coarse, *_ = adaptive_run("cosine", 1e-5, steps=1)
    fine, *_ = adaptive_run("cosine", 1e-5, steps=4)
    assert coarse.calls <= fine.calls < 1.3 * coarse.calls


@each("schedule")
def test_one_step_in_the_grid_goes_all_the_way(schedule):
    denoiser = Counted(gaussian(build("schedule", schedule), 0.4, 0.6))
    start = Karras(sigma_max=50.0)(denoiser.schedule, 1)[0].item()
    x = noisy(denoiser.denoiser, 16, start)
    times = torch.tensor([start, 0.0], dtype=F64)
    out = Adaptive(rtol=1e-3, atol=1e-3)(denoiser, x, times, noise=no_noise)
    assert (out - closed_form(denoiser.denoiser, x, start, 0.0)).abs().max() < 0.02
    assert denoiser.calls < 200


def test_a_denoiser_that_is_not_finite_does_not_run_for_ever():
    class Broken(Counted):
        def forward(self, x_t, t, **cond):
            return super().forward(x_t, t, **cond) * torch.nan

    with pytest.raises(DiffxError, match="too short"):
        Adaptive()(Broken(mixture(Cosine())), torch.ones(1, 2, dtype=F64), torch.tensor([1.0, 0.0]), noise=no_noise)


@pytest.mark.parametrize("wrong", [{"order": 0}, {"order": -1}])
@pytest.mark.parametrize("sampler", ["deis", "deis_log_rho", "lms", "unipc"])
def test_an_order_that_is_none_is_refused(sampler, wrong):
    with pytest.raises(DiffxError, match="order"):
        type(built(sampler))(**wrong)


# ---- the distribution of stochastic samplers ----

# Langevin's steps are as long as the norms say: no affine map
AFFINE = [sampler for sampler in STOCHASTIC if sampler != "predictor_corrector"]


def unbiased(sampler):
    """The sampler; S_noise ≠ 1 is meant to miss the exact variance."""
    return built(sampler, **({"S_noise": 1.0} if sampler == "edm_stochastic" else {}))


def affine(sampler, denoiser, times):
    """The affine map that a sampler is where the denoiser is affine: slope, offset and the gains of all noises.

    Every unit vector of (x, noises) is a row of one batch, so that a state kept between steps is covered.
    """
    steps = len(times) - 1
    x = torch.zeros(2 + steps, 1, dtype=F64)
    x[1] = 1

    def noise(step, draw=0):
        assert draw == 0
        unit = torch.zeros_like(x)
        unit[2 + step] = 1
        return unit

    out = sampler(denoiser, x, times, noise=noise)[:, 0]
    offset = out[0]
    return out[1] - offset, offset, out[2:] - offset


def moments_error(sampler, denoiser, times):
    """Relative errors of the mean and of the variance at the end, from the exact ones at the start."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels_at(denoiser.schedule, times[i].item()) for i in (0, -1))
    mean, std = denoiser.means.item(), denoiser.stds.item()
    slope, offset, gains = affine(sampler, denoiser, times)
    exact = (alpha_s * std) ** 2 + sigma_s**2
    variance = slope**2 * ((alpha_t * std) ** 2 + sigma_t**2) + gains.square().sum()
    return abs(slope * alpha_t * mean + offset - alpha_s * mean).item() / exact**0.5, abs(variance / exact - 1).item()


@pytest.mark.parametrize(
    ("sampler", "schedule", "discretization"),
    [*in_pairs(AFFINE, SCHEDULES, DISCRETIZATIONS), *turns(MORE_STOCHASTIC, SCHEDULES, DISCRETIZATIONS)],
)
def test_exact_mean_and_variance_in_the_limit(schedule, discretization, sampler):
    denoiser, name, sampler = gaussian(build("schedule", schedule), 0.8, 0.6), sampler, unbiased(sampler)
    # below 100 steps EDM's noise is at its bound of √2 − 1
    steps = (100, 200) if name != "euler_maruyama" else (200, 400)
    grids = [build("discretization", discretization)(denoiser.schedule, k, START, STOP) for k in steps]
    errors = np.array([moments_error(sampler, denoiser, times) for times in grids])
    lengths = [1 / denoiser.schedule.logsnr(times).diff().max().item() for times in grids]
    for moment in range(2):
        # more is luck of this moment, less is not what was declared; 1e-5 is next to exact
        assert errors[-1, moment] < 1e-5 or slope_of(errors[:, moment], lengths) > sampler.order - 0.3
    assert errors[-1].max() < 0.1


def test_the_probe_can_fail():
    class Wrong(DDPM):  # with half the noise
        def __call__(self, denoiser, x, times, *, noise, **cond):
            return super().__call__(denoiser, x, times, noise=lambda step: noise(step) / 2**0.5, **cond)

    denoiser = gaussian(Cosine(), 0.8, 0.6)
    times = Uniform()(denoiser.schedule, 128, START, STOP)
    assert moments_error(DDPM(), denoiser, times)[1] < 0.04
    assert moments_error(Wrong(), denoiser, times)[1] > 0.1


@each("schedule")
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_smaller_variance_is_exact_for_one_point(schedule, steps):
    denoiser = gaussian(build("schedule", schedule), 0.7, 0.0)
    times = Uniform()(denoiser.schedule, steps, 1.0, 0.05)
    for sampler in (DDPM(v=0), DDIM(eta=1), DDIM(eta=0.3), DDIM(eta=0)):
        assert max(moments_error(sampler, denoiser, times)) < 1e-10


@pytest.mark.parametrize("schedule", ["linear", "cosine", "ddpm"])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_larger_variance_is_exact_for_standard_normal_data(schedule, steps):
    denoiser = gaussian(build("schedule", schedule), 0.0, 1.0)
    times = Uniform()(denoiser.schedule, steps, 1.0, 0.05)
    assert max(moments_error(DDPM(v=1), denoiser, times)) < 1e-10
    assert moments_error(DDPM(v=0), denoiser, times)[1] > 1e-4


def test_more_noise_than_was_there_widens_the_distribution():
    denoiser = gaussian(EDM(), 0.8, 0.6)
    times = LogSNR()(denoiser.schedule, 256, 0.5, 1e-4)
    exact, wider = (
        affine(EDMHeun(S_churn=40, S_noise=S_noise), denoiser, times)[2].square().sum() for S_noise in (1.0, 1.02)
    )
    assert 1.01 < wider / exact < 1.2


class Pointwise(Denoiser):
    """Samples of many independent points `[B, N, D]`: what holds in many dimensions can be seen in D."""

    def __init__(self, points):
        super().__init__()
        self.points, self.schedule = points, points.schedule

    def forward(self, x_t, t, **cond):
        return self.posterior(x_t, t, torch.zeros((), dtype=F64))[0]

    def posterior(self, x_t, t, s, **cond):
        t = t if t.ndim == 0 else t.repeat_interleave(x_t.shape[1])
        return tuple(value.reshape(x_t.shape) for value in self.points.posterior(x_t.flatten(0, 1), t, s))


def sampled(solver, denoiser, times, batch, points):
    """Points `[B·N, D]` from pure noise; the denoiser calls it took."""
    counted = Counted(Pointwise(denoiser))
    noise = keyed_noise(torch.arange(batch), (points, denoiser.means.shape[1]))
    x = levels_at(denoiser.schedule, times[0].item())[1] * noise(0, "start")
    return solver(counted, x, times, noise=noise).flatten(0, 1), counted.calls


def distances(x, denoiser):
    """√n times Kolmogorov's distance between the samples and the data, in eight directions."""
    weights, result = denoiser.log_weights.exp().numpy(), []
    for angle in np.arange(8) * np.pi / 8:
        direction = torch.tensor([np.cos(angle), np.sin(angle)])
        means, stds = denoiser.means @ direction, (denoiser.stds**2 @ direction**2).sqrt()
        cdf = partial(lambda value, m, s: stats.norm.cdf(value[:, None], m, s) @ weights, m=means, s=stds)
        result.append(len(x) ** 0.5 * stats.kstest((x @ direction).numpy(), cdf).statistic)
    return result


# Kolmogorov's distance is above it in one of a thousand samples; in eight directions in less than one of 125
LEVEL = stats.kstwobign.isf(1e-3)


@pytest.mark.parametrize(("sampler", "schedule"), turns(ALL, SCHEDULES))
def test_the_distribution_of_the_samples(schedule, sampler):
    denoiser, sampler = mixture(build("schedule", schedule)), built(sampler)
    times = build("discretization", "karras")(denoiser.schedule, 256 if sampler.order == 1 else 64)
    x, _ = sampled(sampler, denoiser, times, batch=8, points=250)
    weights, means, stds = denoiser.log_weights.exp()[:, None], denoiser.means, denoiser.stds
    mean = (weights * means).sum(0)
    variance = (weights * (stds**2 + means**2)).sum(0) - mean**2
    # four standard errors, and what so many steps leave
    assert ((x.mean(0) - mean).abs() < 4 * (variance / len(x)).sqrt() + 0.02).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * (2 / len(x)) ** 0.5 + 0.06).all()
    assert max(distances(x, denoiser)) < LEVEL + 0.015 * len(x) ** 0.5


# evaluations after which ten thousand points do not tell a solver of that order from the data
EVALUATIONS = {1: 200, 2: 99}


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_ten_thousand_points_are_not_told_from_the_data(sampler):
    denoiser, solver = mixture(Linear()), unbiased(sampler)
    budget = EVALUATIONS[solver.order]
    times = LogSNR()(denoiser.schedule, (budget - 1) // solver.evaluations + 1)
    x, calls = sampled(solver, denoiser, times, batch=10, points=1000)
    assert calls <= budget
    assert max(distances(x, denoiser)) < LEVEL


@pytest.mark.parametrize(("steps", "factor"), [(200, 0.95), (25, 1.0)])
def test_ten_thousand_points_tell_a_wrong_sampler(steps, factor):
    # with a twentieth of the noise's standard deviation missing, and with too few steps
    class Short(DDPM):
        def step(self, *args, noise, **kwargs):
            return super().step(*args, noise=lambda: factor * noise(), **kwargs)

    denoiser = mixture(Linear())
    x, _ = sampled(Short(), denoiser, LogSNR()(denoiser.schedule, steps), batch=10, points=1000)
    assert max(distances(x, denoiser)) > LEVEL


@pytest.mark.parametrize("schedule", ["linear", "flow", "ve"])
def test_langevin_corrections_leave_the_exact_moments_but_for_r_squared(schedule):
    # a corrector alone, from the exact distribution: the predictor stays where it is
    class Stay(DDIM):
        def step(self, denoiser, x_t, t, s, state, **arguments):
            return x_t, state

    # in many dimensions, where the norms, and with them ε, hardly depend on the sample
    denoiser, t = Pointwise(gaussian(build("schedule", schedule), 0.8, 0.6)), 0.5
    alpha, sigma = levels_at(denoiser.schedule, t)
    mean, variance = alpha * 0.8, (alpha * 0.6) ** 2 + sigma**2
    noise = keyed_noise(torch.arange(20), (2000, 1))
    x = mean + variance**0.5 * noise(0, 1)
    level = denoiser.schedule.levels(torch.tensor([t], dtype=F64))[0]
    for r in (0.16, 0.05):
        solver = PredictorCorrector(Stay(), r=r, corrections=100)
        out, _ = solver.step(denoiser, x, level, level, None, noise=partial(noise, round(1000 * r)))
        # x ← (1 − ε/v)·x + √(2ε)·z rests at v/(1 − ε/2v), where ε = 2r²·v
        left = 1 - (1 - 2 * r**2) ** 200
        expected = variance * (1 + left * r**2 / (1 - r**2))
        n = out.numel()
        assert (out.mean() - mean).abs() < 4 * (variance / n) ** 0.5
        assert (out.var() / expected - 1).abs() < 4 * (2 / n) ** 0.5 + r**2 / 5
        assert (out - x).square().mean() > 0.1 * variance  # and have moved


# ---- the contract of a step ----


def row_noise(rows, shape, step):
    """`noise(draw=0)` for some samples."""
    return partial(keyed_noise(rows, shape), step)


def two_steps(sampler, denoiser, x, levels, rows):
    state = sampler.init(denoiser, levels)
    for k in range(2):
        x, state = sampler.step(
            denoiser, x, levels[k], levels[k + 1], state, noise=row_noise(rows, tuple(x.shape[1:]), k)
        )
    return x


OWN_TIMES = {
    "each its own": [[0.9, 0.5, 0.2], [0.8, 0.4, 0.15], [0.7, 0.35, 0.1]],
    "some to the clean end": [[0.9, 0.5, 0.2], [0.8, 0.3, 0.1], [0.6, 0.0, 0.0]],
    "from pure noise": [[1.0, 1.0, 0.9], [0.7, 0.9, 0.6], [0.5, 0.8, 0.0]],
    "all equal": [[0.6, 0.6, 0.6], [0.4, 0.4, 0.4], [0.2, 0.2, 0.2]],
}


@pytest.mark.parametrize(
    ("sampler", "times", "schedule"),
    [(*pair, SCHEDULES[i % len(SCHEDULES)]) for i, pair in enumerate(itertools.product(ALL, OWN_TIMES))],
)
def test_a_time_for_each_sample_is_the_step_of_that_sample_alone(schedule, sampler, times):
    denoiser, sampler = mixture(build("schedule", schedule)), built(sampler)
    times = torch.tensor(OWN_TIMES[times], dtype=F64)
    x = torch.cat([noisy(denoiser, 3, t)[k : k + 1] for k, t in enumerate(times[0].tolist())])
    together = two_steps(sampler, denoiser, x, [denoiser.schedule.level(t, x) for t in times], torch.arange(3))
    assert together.isfinite().all()
    for k in range(3):
        alone = two_steps(sampler, denoiser, x[k : k + 1], denoiser.schedule.levels(times[:, k]), torch.tensor([k]))
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sampler", "schedule", "batch"), turns(ALL, SCHEDULES, [1, 3]))
def test_a_sample_does_not_depend_on_its_batch(schedule, sampler, batch):
    denoiser, sampler = mixture(build("schedule", schedule)), built(sampler)
    times = build("discretization", "karras")(denoiser.schedule, 6)

    def run(index):
        x = Keys(1, index).normal("x", 2, dtype=F64) * levels_at(denoiser.schedule, times[0].item())[1]
        return sampler(denoiser, x, times, noise=keyed_noise(index, (2,)))

    whole = run(torch.arange(16))
    parts = torch.cat([run(index) for index in torch.arange(16).split(batch)])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    assert (whole[0] != whole[1]).all()


@pytest.mark.parametrize(
    ("sampler", "schedule", "discretization", "dtype"),
    in_pairs([*DETERMINISTIC, *STOCHASTIC], SCHEDULES, DISCRETIZATIONS, [torch.float32, F64]),
)
def test_few_steps_end_finite(schedule, discretization, sampler, dtype):
    denoiser, name, sampler = mixture(build("schedule", schedule), dtype), sampler, built(sampler)
    for steps in (1, 4):
        times = build("discretization", discretization)(denoiser.schedule, steps)
        x = Keys(1, torch.arange(4)).normal("x", 2, dtype=dtype) * levels_at(denoiser.schedule, times[0].item())[1]
        out = sampler(denoiser, x, times, noise=keyed_noise(torch.arange(4), (2,), dtype=dtype))
        assert out.isfinite().all()
        assert out.dtype == dtype and out.shape == x.shape
        clean = levels_at(denoiser.schedule, times[-1].item())[1] == 0
        if (
            steps == 1 and clean and sampler.evaluations and name != "edm_stochastic"
        ):  # there is nothing else to know than x̂
            torch.testing.assert_close(out, denoiser(x, times[0].to(dtype)), rtol=1e-4, atol=1e-5)


class Watched(Denoiser):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.calls, self.times = denoiser, denoiser.schedule, 0, []

    def forward(self, x_t, t, **cond):
        return self.posterior(x_t, t, torch.zeros(()), **cond)[0]

    def posterior(self, x_t, t, s, **cond):
        self.calls += 1
        self.times.append(t)
        assert set(cond) == {"label"} and len(cond["label"]) == len(x_t)
        return self.denoiser.posterior(x_t, t, s, **cond)


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_number_of_evaluations_is_the_declared_one(sampler, steps):
    denoiser, sampler = Watched(mixture(Cosine())), built(sampler)
    times = Uniform()(denoiser.schedule, steps)
    x, label = noisy(denoiser.denoiser, 2, 1.0), torch.tensor([0, 3])
    noise = keyed_noise(torch.arange(2), (2,))
    out = sampler(denoiser, x, times, noise=noise, label=label)
    declared = sampler.nfe(steps)
    assert denoiser.calls == declared or (declared is None and denoiser.calls > steps)
    assert all((t.shape == () or declared is None) and (t > 0).all() and (t <= 1).all() for t in denoiser.times)
    path = list(sampler.trajectory(denoiser, x, times, noise=noise, label=label))
    assert len(path) == steps and path[-1].equal(out)


def test_calls_are_counted():
    denoiser = Counted(mixture(Cosine()))
    x = noisy(denoiser.denoiser, 3, 1.0)
    torch.testing.assert_close(denoiser(x, torch.ones(())), denoiser.denoiser(x, torch.ones(())))
    solver = DPMSolver2()
    solver(denoiser, x, Uniform()(denoiser.schedule, 4), noise=no_noise)
    assert denoiser.calls == 1 + solver.nfe(4) and denoiser.samples == 3 * denoiser.calls


@every_sampler
def test_samples_of_any_shape(sampler):
    class Images(Pointwise):
        def posterior(self, x_t, t, s, **cond):
            return tuple(value.reshape(x_t.shape) for value in super().posterior(x_t.reshape(len(x_t), -1, 1), t, s))

    denoiser, sampler, shape = Images(gaussian(Cosine(), 0.2, 0.5)), built(sampler), (3, 2, 4)
    x, noise = Keys(0, torch.arange(5)).normal("x", *shape, dtype=F64), keyed_noise(torch.arange(5), shape)
    times = Uniform()(denoiser.schedule, 5)
    out = sampler(denoiser, x, times, noise=noise)
    flat = sampler(denoiser, x.flatten(1), times, noise=lambda *args, **kwargs: noise(*args, **kwargs).flatten(1))
    torch.testing.assert_close(out, flat.reshape(out.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [-1e-17, torch.tensor([-1e-17])])
def test_a_variance_rounded_below_zero_is_zero(value):
    assert sqrt(value) == 0


# ---- identities between samplers ----


def run(sampler, schedule, steps=9):
    denoiser = mixture(build("schedule", schedule))
    x, index = noisy(denoiser, 6, START), torch.arange(6)
    return sampler(denoiser, x, Uniform()(denoiser.schedule, steps, START, STOP), noise=keyed_noise(index, (2,)))


@each("schedule")
def test_ddim_with_full_noise_is_ddpm(schedule):
    torch.testing.assert_close(run(DDIM(eta=1), schedule), run(DDPM(v=0), schedule), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["flow", "edm"])
def test_ddim_is_eulers_method_where_the_path_is_straight(schedule):
    torch.testing.assert_close(run(DDIM(), schedule), run(Euler(), schedule), rtol=1e-10, atol=1e-10)


def test_edms_sampler_is_heuns_method_on_its_schedule():
    torch.testing.assert_close(run(EDMHeun(), "edm"), run(Heun(), "edm"), rtol=1e-10, atol=1e-10)


@each("schedule")
def test_edms_sampler_is_the_same_on_every_schedule(schedule):
    # in y and ρ there is one ODE: the same levels of ρ give the same y
    grid = Karras(sigma_min=0.1, sigma_max=10.0)

    def scaled(denoiser):
        times = grid(denoiser.schedule, 9)[:-1]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels_at(denoiser.schedule, times[i].item()) for i in (0, -1))
        assert sigma_t / alpha_t == pytest.approx(10) and sigma_s / alpha_s == pytest.approx(0.1)
        noise = keyed_noise(torch.arange(6), (2,))
        return EDMHeun(S_churn=1)(denoiser, alpha_t * 10 * noise(99), times, noise=noise) / alpha_s

    expected = scaled(mixture(EDM()))
    torch.testing.assert_close(scaled(mixture(build("schedule", schedule))), expected, rtol=1e-6, atol=1e-6)


@each("schedule")
def test_adaptive_steps_are_the_same_on_every_schedule(schedule):
    def run(schedule):
        denoiser = Counted(mixture(schedule))
        times = schedule.inverse(-2 * torch.tensor([8.0, 0.05], dtype=F64).log())
        (alpha_t, _), (alpha_s, _) = (levels_at(schedule, t.item()) for t in times)
        y = 8 * Keys(0, torch.arange(6)).normal("y", 2, dtype=F64)
        return Adaptive()(denoiser, alpha_t * y, times, noise=no_noise) / alpha_s, denoiser.samples

    (y, samples), (expected, as_many) = run(build("schedule", schedule)), run(Flow())
    assert samples == as_many
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@each("schedule")
def test_edms_sampler_is_dpm_solver_2_with_its_estimate_at_the_end(schedule):
    torch.testing.assert_close(run(DPMSolver2(r=1.0), schedule), run(EDMHeun(), schedule), rtol=1e-7, atol=1e-7)


@each("schedule")
def test_unipc_2_predicts_as_the_multistep_solver(schedule):
    # without its corrector: a first and a second step from samples that are not corrected
    denoiser = mixture(build("schedule", schedule))
    x, levels = noisy(denoiser, 6, START), denoiser.schedule.levels(torch.tensor([0.9, 0.7, 0.4], dtype=F64))
    ours, theirs = UniPC(order=2), DPMSolverPP2M()
    x_1, unipc = ours.step(denoiser, x, levels[0], levels[1], ours.init(denoiser, levels), noise=no_noise)
    expected_1, multistep = theirs.step(denoiser, x, levels[0], levels[1], None, noise=no_noise)
    torch.testing.assert_close(x_1, expected_1)
    corrected = ours.step(denoiser, x_1, levels[1], levels[2], unipc, noise=no_noise)[1].x
    expected, _ = theirs.step(denoiser, x_1, levels[1], levels[2], multistep, noise=no_noise)
    predicted, _ = ours.step(denoiser, x_1, levels[1], levels[2], unipc, noise=no_noise)
    ratio = levels[2].sigma / levels[1].sigma
    torch.testing.assert_close(predicted - ratio * corrected, expected - ratio * x_1, rtol=1e-9, atol=1e-9)


INTEGRATORS_OF_X_HAT = [DDIM(), DPMSolverPP2M(), DPMSolverPP3M(), DPMSolverPP2S(), DPMSolver2(), DPMSolver3(), UniPC()]


@each("schedule")
@pytest.mark.parametrize("sampler", [*INTEGRATORS_OF_X_HAT, EDMHeun(), Adaptive()])
def test_exponential_integrators_are_exact_for_one_point(schedule, sampler):
    denoiser = gaussian(build("schedule", schedule), 0.7, 0.0)
    x = noisy(denoiser, 4, START)
    out = sampler(denoiser, x, Uniform()(denoiser.schedule, 3, START, STOP), noise=no_noise)
    torch.testing.assert_close(out, closed_form(denoiser, x, START, STOP), rtol=1e-9, atol=1e-10)


def test_the_larger_variance_adds_more_noise():
    spreads = [run(DDPM(v), "cosine", 4) for v in (0.0, 0.5, 1.0)]
    denoiser = GaussianMixture(torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64), Cosine())
    times = Uniform()(denoiser.schedule, 4, START, STOP)
    gains = [affine(DDPM(v), denoiser, times)[2].square().sum() for v in (0.0, 0.5, 1.0)]
    assert gains[0] < gains[1] < gains[2]
    assert not torch.equal(spreads[0], spreads[2])
