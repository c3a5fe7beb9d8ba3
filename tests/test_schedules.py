"""Every schedule keeps the contract: positive, decreasing, invertible, of the right shape, accurate in float32."""

import math

import pytest
import torch
from conftest import F64, build, choices, each
from diffusers import DDPMScheduler
from scipy import stats
from torch import nn

from diffx.schedules import (
    EDM,
    LOGSNR_MAX,
    Cosine,
    Flow,
    GeneralizedVP,
    Laplace,
    Learned,
    Linear,
    Schedule,
    Shifted,
    Sigmoid,
    SubVP,
    Tabulated,
    TimeShift,
    ZeroSNR,
)
from diffx.schedules.base import logsnr
from diffx.utils import DiffxError

# 1 − 1e-6 and 1e-6, because all of (0, 1) is promised
TIMES = torch.cat(
    [torch.logspace(-6, -2, 100, dtype=F64), torch.linspace(0.011, 0.999, 989, dtype=F64), torch.tensor([1 - 1e-6])]
)


class Mine(Schedule):
    """A schedule with a parameter, as a user would write one: `forward` alone."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(12.0))

    def forward(self, t):
        value = 6 - self.slope * t
        return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()


def built(choice):
    return Mine() if choice == "mine" else build("schedule", choice)


every_schedule = pytest.mark.parametrize("choice", [*choices("schedule"), "mine"])


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_coefficients_are_positive_and_logsnr_decreases(choice, dtype):
    schedule, times = built(choice), TIMES.to(dtype)
    alpha, sigma = schedule(times)
    assert (alpha > 0).all() and (sigma > 0).all()
    assert alpha.isfinite().all() and sigma.isfinite().all()
    assert (schedule.logsnr(times).diff() < 0).all()


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ends(choice, dtype):
    schedule, ends = built(choice), torch.tensor([0.0, 1.0], dtype=dtype)
    alpha, sigma = schedule(ends)
    values = schedule.logsnr(ends)
    assert alpha.isfinite().all() and sigma.isfinite().all()
    assert (alpha >= 0).all() and (sigma >= 0).all()
    assert values.abs().max() <= LOGSNR_MAX and values[0] > values[1]


@pytest.mark.parametrize("choice", [choice for choice in choices("schedule") if choice != "learned"])
def test_clean_at_the_start_and_nearly_noise_at_the_end(choice):
    alpha, sigma = build("schedule", choice)(torch.tensor([0.0, 1.0], dtype=F64))
    assert sigma[0] == 0
    assert alpha[0] == pytest.approx(1, abs=1e-12)
    assert alpha[1] / sigma[1] < 0.03


@every_schedule
def test_inverse_undoes_logsnr(choice):
    schedule = built(choice)
    torch.testing.assert_close(schedule.inverse(schedule.logsnr(TIMES)), TIMES, rtol=0, atol=1e-10)
    single = TIMES[::10].float()
    # logSNR linear in t cannot be resolved by float32 next to its largest value
    atol = 1e-6 if choice in ("mine", "learned") else 0
    torch.testing.assert_close(schedule.inverse(schedule.logsnr(single)), single, rtol=1e-5, atol=atol)


@every_schedule
def test_inverse_beyond_the_range_is_an_end(choice):
    t = built(choice).inverse(torch.tensor([100.0, -100.0], dtype=F64))
    torch.testing.assert_close(t, torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_shapes_and_dtypes(choice, shape, dtype):
    schedule = built(choice)
    t = torch.full(shape, 0.4, dtype=dtype)
    outputs = [*schedule(t), schedule.logsnr(t), schedule.inverse(torch.full(shape, 1.0, dtype=dtype))]
    for value in outputs:
        assert value.shape == shape
        assert value.dtype == dtype
    # one time at a time or all at once is the same
    torch.testing.assert_close(outputs[2], schedule.logsnr(t.reshape(-1)[:1]).expand(t.numel()).reshape(shape))


@each("schedule")
def test_float32_is_as_accurate_as_its_times(schedule):
    schedule = build("schedule", schedule)
    times = TIMES.float()
    for near_the_end, tolerance in ((False, 2e-6), (True, 1e-4)):
        t = times[(times > 0.9) == near_the_end]
        for single, exact in zip(schedule(t), schedule(t.double()), strict=True):
            torch.testing.assert_close(single.double(), exact, rtol=tolerance, atol=0)
        torch.testing.assert_close(schedule.logsnr(t).double(), schedule.logsnr(t.double()), rtol=0, atol=4 * tolerance)


@every_schedule
def test_levels_hold_the_schedule_and_its_slopes(choice):
    schedule = built(choice)
    times = torch.tensor([0.97, 0.7013, 0.5, 0.2, 0.0507], dtype=F64)
    levels = schedule.levels(times)
    h = 1e-6
    alpha, sigma = schedule(times)
    slopes = [(up - down) / (2 * h) for up, down in zip(schedule(times + h), schedule(times - h), strict=True)]
    for k, level in enumerate(levels):
        assert level.t.equal(times[k]) and level.t.shape == ()
        assert level.time == times[k].item()
        assert isinstance(level.alpha, float) and isinstance(level.d_sigma, float)
        assert level.alpha == pytest.approx(alpha[k].item(), rel=1e-14)
        assert level.sigma == pytest.approx(sigma[k].item(), rel=1e-14)
        assert level.logsnr == pytest.approx(2 * math.log(level.alpha / level.sigma), abs=1e-12)
        assert level.d_alpha == pytest.approx(slopes[0][k].item(), rel=2e-6, abs=1e-8)
        assert level.d_sigma == pytest.approx(slopes[1][k].item(), rel=2e-6, abs=1e-8)


@every_schedule
def test_levels_of_a_batch_are_those_of_each_time(choice):
    schedule = built(choice)
    times = torch.tensor([0.9, 0.1, 0.5], dtype=F64)
    batch = schedule.level(times, like=torch.zeros(3, 2, 4, 4))
    assert batch.t.equal(times)
    for name in ("time", "alpha", "sigma", "logsnr", "d_alpha", "d_sigma"):
        value = getattr(batch, name)
        assert value.shape == (3, 1, 1, 1)
        one_by_one = [getattr(level, name) for level in schedule.levels(times)]
        torch.testing.assert_close(value.flatten(), torch.tensor(one_by_one, dtype=F64), rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_levels_need_no_autograd_of_the_caller_and_leave_none(choice, mode):
    schedule = built(choice)
    times = torch.tensor([0.6, 0.3], dtype=F64)
    expected = schedule.levels(times)
    with mode():
        inside = schedule.levels(times.clone())
        batch = schedule.level(times.clone(), like=torch.zeros(2, 3))
    for a, b in zip(inside, expected, strict=True):
        assert a[1:] == b[1:]
    assert not any(value.requires_grad for value in batch)
    assert all(parameter.grad is None for parameter in schedule.parameters())


@every_schedule
def test_levels_at_the_ends_are_numbers(choice):
    noisy, clean = built(choice).levels(torch.tensor([1.0, 0.0], dtype=F64))
    assert all(math.isfinite(value) for value in noisy[1:])
    assert all(math.isfinite(value) for value in clean[1:-2])  # √t has no slope at 0


def test_a_learned_schedule_learns():
    schedule = Mine()
    schedule.logsnr(torch.tensor([0.5])).sum().backward()
    assert schedule.slope.grad is not None and schedule.slope.grad != 0


def test_logsnr_is_bounded_where_a_coefficient_vanishes():
    zero, one = torch.zeros(()), torch.ones(())
    assert logsnr(zero, one) == -LOGSNR_MAX
    assert logsnr(one, zero) == LOGSNR_MAX


def test_ddpm_is_the_table():
    schedule = build("schedule", "ddpm")
    alpha, sigma = schedule(torch.arange(1, 1001, dtype=F64) / 1000)
    exact = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    torch.testing.assert_close(alpha**2, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - exact, rtol=1e-11, atol=0)
    torch.testing.assert_close((alpha**2).float(), DDPMScheduler().alphas_cumprod, rtol=1e-5, atol=0)


def test_a_table_keeps_its_nodes_and_is_smooth_between():
    betas = torch.tensor([0.1, 0.5, 0.2, 0.3], dtype=F64)
    schedule = Tabulated(betas)
    nodes = torch.arange(5, dtype=F64) / 4
    exact = torch.cat([torch.ones(1, dtype=F64), torch.cumprod(1 - betas, 0)])
    torch.testing.assert_close(schedule(nodes)[0] ** 2, exact, rtol=1e-12, atol=0)
    # the slopes on both sides of an inner node agree
    left, right = (schedule.levels(nodes[1:-1] + shift) for shift in (-1e-9, 1e-9))
    for a, b in zip(left, right, strict=True):
        assert a.d_alpha == pytest.approx(b.d_alpha, rel=1e-6)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [[0.1]], [0.1, float("nan")]])
def test_a_table_of_impossible_betas_is_refused(betas):
    with pytest.raises(DiffxError, match=r"schedule\.betas"):
        Tabulated(betas)


@pytest.mark.parametrize("table", [[], [1.0, 0.5], [0.5, 0.0], [0.5, 0.5], [0.3, 0.5], [[0.1]], [0.1, float("nan")]])
def test_a_table_of_impossible_products_is_refused(table):
    with pytest.raises(DiffxError, match=r"schedule\.alphas_cumprod"):
        Tabulated(alphas_cumprod=table)


@pytest.mark.parametrize("table", [{}, {"betas": [0.1], "alphas_cumprod": [0.9]}])
def test_a_table_is_given_once(table):
    with pytest.raises(DiffxError, match="give one and not both"):
        Tabulated(**table)


def test_betas_and_their_products_are_the_same_table():
    betas = torch.tensor([0.1, 0.5, 0.2, 0.3], dtype=F64)
    products = Tabulated(alphas_cumprod=torch.cumprod(1 - betas, 0).tolist())
    for a, b in zip(products(TIMES), Tabulated(betas.tolist())(TIMES), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_one_step_table():
    alpha, _ = Tabulated([0.36])(torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.8], dtype=F64))


def test_linear_is_the_limit_of_ddpms_table():
    t = torch.arange(1, 1001, dtype=F64) / 1000
    difference = []
    for steps in (1000, 4000):
        # β per step shrinks as the steps multiply
        table = Tabulated(torch.linspace(0.1 / steps, 20 / steps, steps, dtype=F64))
        difference.append((table(t)[0] ** 2 - Linear()(t)[0] ** 2).abs().max().item())
    assert difference[0] < 5e-3
    assert difference[1] == pytest.approx(difference[0] / 4, rel=0.1)


def test_linear_agrees_with_its_integral():
    t = torch.linspace(0, 1, 200001, dtype=F64)
    beta = 0.1 + (20 - 0.1) * t
    integral = torch.cumulative_trapezoid(beta, t)
    torch.testing.assert_close(2 * Linear()(t[1:])[0].log(), -integral, rtol=1e-9, atol=1e-12)


def test_cosine_agrees_with_diffusers_before_the_clipped_step():
    table = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    schedule = Cosine()
    alpha, sigma = schedule(torch.arange(1, 1000, dtype=F64) / 1000)
    # ᾱ_min moves ᾱ by at most itself; the rest is diffusers' float32 product
    torch.testing.assert_close(alpha**2, table[:-1], rtol=5e-5, atol=schedule.alpha_bar_min)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)
    assert schedule(torch.ones((), dtype=F64))[0].item() == pytest.approx(math.sqrt(3e-7), rel=1e-6)


VARIANCE_PRESERVING = [
    "linear",
    "cosine",
    "ddpm",
    "sigmoid",
    "laplace",
    "gvp",
    "tabulated",
    "shifted",
    "zero_snr",
    "learned",
]


@pytest.mark.parametrize("choice", VARIANCE_PRESERVING)
def test_variance_preserving(choice):
    alpha, sigma = build("schedule", choice)(TIMES)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=3e-14, atol=0)


def test_variance_exploding_is_geometric():
    t = torch.linspace(0.3, 1, 8, dtype=F64)
    _, sigma = build("schedule", "ve")(t)
    torch.testing.assert_close((sigma**2 + 0.01**2).sqrt(), 0.01 * (50 / 0.01) ** t, rtol=1e-12, atol=0)


def test_flow_and_edm_are_straight():
    alpha, sigma = Flow()(TIMES)
    assert alpha.equal(1 - TIMES) and sigma.equal(TIMES)
    alpha, sigma = build("schedule", "edm")(TIMES)
    assert (alpha == 1).all() and sigma.equal(80.0 * TIMES)


# ---- each against its closed form ----


def test_sigmoid_is_the_papers():
    # arXiv 2301.10972, Alg. 1, as written there
    def gamma(t, start, end, tau):
        first, last = (torch.sigmoid(torch.tensor(v / tau, dtype=F64)) for v in (start, end))
        return (last - torch.sigmoid((t * (end - start) + start) / tau)) / (last - first)

    t = torch.linspace(0, 1, 101, dtype=F64)
    for start, end, tau in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-3.0, 3.0, 0.1)]:
        alpha, sigma = Sigmoid(start, end, tau)(t)
        torch.testing.assert_close(alpha**2, gamma(t, start, end, tau), rtol=1e-9, atol=2e-9)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 2.0)])
def test_logsnr_of_laplace_has_its_law(mu, b):
    schedule = Laplace(mu, b, logsnr_min=mu - 20 * b)
    t = torch.linspace(0.001, 0.999, 99, dtype=F64)
    # the quantile of noise t is that of signal 1 − t
    expected = torch.from_numpy(stats.laplace.ppf(1 - t.numpy(), mu, b))
    torch.testing.assert_close(schedule.logsnr(t), expected, rtol=1e-6, atol=1e-6)
    # the paper's form, with its sign and absolute values
    papers = mu - b * torch.sign(0.5 - t) * torch.log(1 - 2 * (t - 0.5).abs())
    torch.testing.assert_close(schedule.logsnr(t), papers, rtol=1e-6, atol=1e-6)
    assert schedule.logsnr(torch.ones((), dtype=F64)).item() == pytest.approx(mu - 20 * b)


def test_sub_vp_has_the_square_of_linears_noise():
    (alpha, sigma), (linear, noise) = SubVP()(TIMES), Linear()(TIMES)
    assert alpha.equal(linear)
    torch.testing.assert_close(sigma, noise**2, rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma, 1 - alpha**2, rtol=1e-8, atol=1e-15)


def test_generalised_vp_is_a_quarter_of_a_circle():
    for dtype in (torch.float32, F64):
        alpha, sigma = GeneralizedVP()(torch.tensor([0.0, 1 / 3, 1.0], dtype=dtype))
        assert alpha[2] == 0 and sigma[0] == 0
        assert alpha[0] == 1 and sigma[2] == 1
        assert sigma[1].item() == pytest.approx(0.5, rel=1e-7)


INNER = [Cosine(), Linear(), Flow(), EDM(), SubVP(), Tabulated.ddpm()]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
def test_shifted_shifts_logsnr_and_keeps_the_scale(inner, ratio):
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    schedule = Shifted(inner, ratio)
    torch.testing.assert_close(schedule.logsnr(t), inner.logsnr(t) + 2 * math.log(ratio))
    (alpha, sigma), (plain, noise) = schedule(t), inner(t)
    torch.testing.assert_close(alpha**2 + sigma**2, plain**2 + noise**2)
    if isinstance(inner, Cosine):  # the paper's: 256 pixels where it was made for 64
        torch.testing.assert_close(alpha**2, torch.sigmoid(inner.logsnr(t) + 2 * math.log(ratio)))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_time_shift_is_equation_23(inner, shift):
    t = torch.linspace(0, 1, 51, dtype=F64)
    for a, b in zip(TimeShift(inner, shift)(t), inner(shift * t / (1 + (shift - 1) * t)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_the_two_shifts_agree_on_the_flow_schedule():
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    torch.testing.assert_close(TimeShift(Flow(), 3.0).logsnr(t), Shifted(Flow(), 1 / 3.0).logsnr(t))


@pytest.mark.parametrize("inner", [Cosine(), Linear(), Flow(), GeneralizedVP(), Sigmoid(), Learned(), Tabulated.ddpm()])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_snr_ends_at_exactly_zero(inner, dtype):
    schedule = ZeroSNR(inner)
    for n in (1, 2, 7, 16, 33):  # vectorised or not
        assert (schedule(torch.ones(n, dtype=dtype))[0] == 0).all()
    assert schedule(torch.ones((), dtype=dtype))[0] == 0
    alpha, sigma = schedule(torch.linspace(0, 1, 101, dtype=dtype))
    assert (alpha[:-1] > 0).all() and alpha[-1] == 0
    scale = [(a**2 + s**2).detach() for a, s in (schedule(TIMES), inner(TIMES))]
    torch.testing.assert_close(scale[0], scale[1], rtol=1e-12, atol=0)
    assert sigma.isfinite().all()


def test_zero_snr_is_diffusers_but_for_the_first_step():
    table = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double()
    alpha, _ = ZeroSNR(Tabulated.ddpm())(torch.arange(1, 1001, dtype=F64) / 1000)
    # they keep ᾱ of their first step, here 1 − 1e-4 is kept up to its share of α(1)
    torch.testing.assert_close(alpha**2, table, rtol=1e-4, atol=1e-6)
    assert alpha[-1] == 0


def test_zero_snr_of_a_schedule_without_falling_alpha_is_refused():
    with pytest.raises(DiffxError, match="EDM") as refusal:
        ZeroSNR(EDM())
    assert "cosine" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_wrapped_schedule_is_named_on_the_command_line():
    # schedule=shifted schedule.schedule._target_=diffx.schedules.Linear
    schedule = build("schedule", "shifted", schedule={"_target_": "diffx.schedules.Linear", "beta_max": 10.0})
    assert schedule.schedule.beta_max == 10
