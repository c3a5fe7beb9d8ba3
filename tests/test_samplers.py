"""Every sampler converges as it declares: to the exact solution, or to the exact distribution.

Data whose denoiser is known exactly (a Gaussian, a mixture) leave no other error than the solver's. The
probability-flow ODE has one solution in y = x/α as a function of ρ = σ/α whatever the schedule, dy/d log ρ = y − x̂,
which is where the reference comes from, so that no schedule's slopes enter into it.
"""

from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from conftest import F64, build, choices, each, gaussian, is_stochastic, keyed_noise, mixture, no_noise
from scipy import stats
from scipy.integrate import solve_ivp

from diffx.denoisers import Denoiser, GaussianMixture
from diffx.discretizations import Uniform
from diffx.samplers import DDIM, DDPM, DPMSolverPP2M
from diffx.samplers.base import sqrt
from diffx.schedules import Cosine, Flow
from diffx.utils import Keys

START, STOP = 0.9, 0.1
DETERMINISTIC = [choice for choice in choices("sampler") if not is_stochastic(build("sampler", choice))]
# the YAML files as they are, and the other ends of the stochastic families
STOCHASTIC = {
    **{choice: {} for choice in choices("sampler") if choice not in DETERMINISTIC},
    "ddpm v=0.5": {"v": 0.5},
    "ddpm v=1": {"v": 1.0},
    "ddim eta=0.5": {"eta": 0.5},
    "ddim eta=1": {"eta": 1.0},
}
every_sampler = pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC])
every_stochastic = pytest.mark.parametrize("sampler", list(STOCHASTIC))


def built(sampler):
    return build("sampler", sampler.split()[0], **STOCHASTIC.get(sampler, {}))


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
    denoiser = mixture(build("schedule", schedule))
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


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@each("discretization")
@each("schedule")
def test_measured_order_is_the_declared_one(schedule, discretization, sampler):
    denoiser, x, exact = problem(schedule)
    grid, sampler, steps = build("discretization", discretization), built(sampler), (64, 128, 256)
    errors = [
        (sampler(denoiser, x, grid(denoiser.schedule, k, START, STOP), noise=no_noise) - exact).square().mean().sqrt()
        for k in steps
    ]
    # neither less nor more: an order never reached is as wrong a declaration
    assert slope_of(errors, steps) == pytest.approx(sampler.order, abs=0.3)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@each("schedule")
def test_the_whole_way_to_the_clean_end_converges(schedule, sampler):
    denoiser, sampler = gaussian(build("schedule", schedule), 0.4, 0.6), built(sampler)
    grid = build("discretization", "karras", sigma_max=50.0)
    start = grid(denoiser.schedule, 4)[0].item()
    x = noisy(denoiser, 16, start)
    exact = closed_form(denoiser, x, start, 0.0)
    steps = (32, 64, 128)
    errors = [(sampler(denoiser, x, grid(denoiser.schedule, k), noise=no_noise) - exact).abs().max() for k in steps]
    assert slope_of(errors, steps) > sampler.order - 0.3
    assert errors[-1] < (0.15 if sampler.order == 1 else 0.005)


# ---- the distribution of stochastic samplers ----

DRAWS = 4  # noises a step may ask for


def affine(sampler, denoiser, times):
    """The affine map that a sampler is where the denoiser is affine: slope, offset and the gains of all noises.

    Every unit vector of (x, noises) is a row of one batch, so that a state kept between steps is covered.
    """
    steps = len(times) - 1
    x = torch.zeros(2 + DRAWS * steps, 1, dtype=F64)
    x[1] = 1

    def noise(step, draw=0):
        assert draw < DRAWS
        unit = torch.zeros_like(x)
        unit[2 + DRAWS * step + draw] = 1
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


@every_stochastic
@pytest.mark.parametrize("discretization", ["uniform", "logsnr", "karras"])
@each("schedule")
def test_exact_mean_and_variance_in_the_limit(schedule, discretization, sampler):
    denoiser, sampler = gaussian(build("schedule", schedule), 0.8, 0.6), built(sampler)
    grid, steps = build("discretization", discretization), (64, 128, 256)
    errors = np.array([moments_error(sampler, denoiser, grid(denoiser.schedule, k, START, STOP)) for k in steps])
    for moment in range(2):
        # more is luck of this moment, less is not what was declared; 1e-9 is exact
        assert errors[-1, moment] < 1e-9 or slope_of(errors[:, moment], steps) > sampler.order - 0.3
    assert errors[-1].max() < 0.15


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


@every_sampler
@pytest.mark.parametrize(
    ("schedule", "discretization"), [*((choice, "karras") for choice in choices("schedule")), ("flow", "uniform")]
)
def test_the_distribution_of_the_samples(schedule, discretization, sampler):
    denoiser, sampler, n = mixture(build("schedule", schedule)), built(sampler), 2000
    times = build("discretization", discretization)(denoiser.schedule, 512 if sampler.order == 1 else 64)
    sigma = levels_at(denoiser.schedule, times[0].item())[1]
    index = torch.arange(n)
    x = sampler(denoiser, sigma * Keys(1, index).normal("x", 2, dtype=F64), times, noise=keyed_noise(index, (2,)))
    weights, means, stds = denoiser.log_weights.exp()[:, None], denoiser.means, denoiser.stds
    mean = (weights * means).sum(0)
    variance = (weights * (stds**2 + means**2)).sum(0) - mean**2
    # four standard errors, and what so many steps leave
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt() + 0.02).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * (2 / n) ** 0.5 + 0.03).all()
    for d in range(2):

        def cdf(value, d=d):
            parts = stats.norm.cdf(value[:, None], means[:, d], stds[:, d])
            return parts @ weights[:, 0].numpy()

        assert stats.kstest(x[:, d].numpy(), cdf).statistic < 1.95 / n**0.5 + 0.01


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


@every_sampler
@each("schedule")
@pytest.mark.parametrize(
    "times",
    [
        [[0.9, 0.5, 0.2], [0.8, 0.4, 0.15], [0.7, 0.35, 0.1]],
        [[0.9, 0.5, 0.2], [0.8, 0.3, 0.1], [0.6, 0.0, 0.0]],  # some reach the clean end before others
        [[0.6, 0.6, 0.6], [0.4, 0.4, 0.4], [0.2, 0.2, 0.2]],
    ],
    ids=["each its own", "some to the clean end", "all equal"],
)
def test_a_time_for_each_sample_is_the_step_of_that_sample_alone(schedule, sampler, times):
    denoiser, sampler = mixture(build("schedule", schedule)), built(sampler)
    times = torch.tensor(times, dtype=F64)
    x = torch.cat([noisy(denoiser, 3, t)[k : k + 1] for k, t in enumerate(times[0].tolist())])
    together = two_steps(sampler, denoiser, x, [denoiser.schedule.level(t, x) for t in times], torch.arange(3))
    assert together.isfinite().all()
    for k in range(3):
        alone = two_steps(sampler, denoiser, x[k : k + 1], denoiser.schedule.levels(times[:, k]), torch.tensor([k]))
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-9, atol=1e-9)


@every_sampler
@each("schedule")
@pytest.mark.parametrize("batch", [1, 3])
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


@every_sampler
@each("discretization")
@each("schedule")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_few_steps_end_finite(schedule, discretization, sampler, dtype):
    denoiser, sampler = mixture(build("schedule", schedule), dtype), built(sampler)
    for steps in (1, 2, 5):
        times = build("discretization", discretization)(denoiser.schedule, steps)
        x = Keys(1, torch.arange(4)).normal("x", 2, dtype=dtype) * levels_at(denoiser.schedule, times[0].item())[1]
        out = sampler(denoiser, x, times, noise=keyed_noise(torch.arange(4), (2,), dtype=dtype))
        assert out.isfinite().all()
        assert out.dtype == dtype and out.shape == x.shape
        if steps == 1:  # there is nothing else to know than x̂
            torch.testing.assert_close(out, denoiser(x, times[0].to(dtype)), rtol=1e-4, atol=1e-5)


class Counting(Denoiser):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.calls, self.times = denoiser, denoiser.schedule, 0, []

    def forward(self, x_t, t, **cond):
        self.calls += 1
        self.times.append(t)
        assert set(cond) == {"label"}
        return self.denoiser(x_t, t, **cond)


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_number_of_evaluations_is_the_declared_one(sampler, steps):
    denoiser, sampler = Counting(mixture(Cosine())), built(sampler)
    times = Uniform()(denoiser.schedule, steps)
    x, label = noisy(denoiser.denoiser, 2, 1.0), torch.tensor([0, 3])
    noise = keyed_noise(torch.arange(2), (2,))
    out = sampler(denoiser, x, times, noise=noise, label=label)
    assert denoiser.calls == sampler.nfe(steps)
    assert all(t.shape == () and 0 < t <= 1 for t in denoiser.times)
    path = list(sampler.trajectory(denoiser, x, times, noise=noise, label=label))
    assert len(path) == steps and path[-1].equal(out)


@every_sampler
def test_samples_of_any_shape(sampler):
    class Pixelwise(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = Cosine()
            self.one = gaussian(self.schedule, 0.2, 0.5)

        def forward(self, x_t, t, **cond):
            return self.one(x_t.reshape(-1, 1), t).reshape(x_t.shape)

    denoiser, sampler, shape = Pixelwise(), built(sampler), (3, 2, 4)
    x, noise = Keys(0, torch.arange(5)).normal("x", *shape, dtype=F64), keyed_noise(torch.arange(5), shape)
    out = sampler(denoiser, x, Uniform()(denoiser.schedule, 5), noise=noise)
    flat = sampler(
        denoiser,
        x.reshape(-1, 1),
        Uniform()(denoiser.schedule, 5),
        noise=lambda step, draw=0: noise(step, draw).reshape(-1, 1),
    )
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
    expected = run(build("sampler", "euler"), schedule)
    torch.testing.assert_close(run(DDIM(), schedule), expected, rtol=1e-10, atol=1e-10)


@each("schedule")
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolverPP2M()])
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
