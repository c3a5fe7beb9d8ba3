"""Every time grid: decreasing, of K + 1 times, from the start to the stop, on every schedule."""

import math

import pytest
import torch
from conftest import F64, build, choices, each

from diffx.discretizations import Integer, Karras, LogSNR
from diffx.schedules import Cosine, Flow
from diffx.utils import DiffxError

every_steps = pytest.mark.parametrize("steps", [1, 2, 3, 18, 250])


@each("schedule")
@each("discretization")
@every_steps
def test_a_full_grid(schedule, discretization, steps):
    grid, schedule = build("discretization", discretization), build("schedule", schedule)
    times = grid(schedule, steps)
    assert times.shape == (steps + 1,) and times.dtype == F64
    assert (times.diff() < 0).all()
    assert (times.float().diff() < 0).all()  # as a sampler in float32 takes them
    assert times[-1] == 0
    # at the largest noise level, or the largest that the grid is defined for
    limit = 2 * math.log(getattr(grid, "sigma_max", math.inf))
    assert schedule.logsnr(times[0]).item() == pytest.approx(
        max(schedule.logsnr(torch.ones((), dtype=F64)).item(), -limit), abs=1e-9
    )


@each("schedule")
@each("discretization")
@pytest.mark.parametrize(("start", "stop"), [(0.9, 0.1), (0.5, 0.0), (1.0, 0.3), (0.35, 0.34), (0.01, 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_a_part_of_the_grid(schedule, discretization, start, stop, steps):
    schedule = build("schedule", schedule)
    times = build("discretization", discretization)(schedule, steps, start, stop)
    assert times.shape == (steps + 1,)
    assert (times.diff() < 0).all()
    assert times[-1] == stop
    assert times[0] <= start
    if start < 1:
        assert times[0] == start


@each("discretization")
def test_a_part_wholly_beyond_the_largest_noise_level(discretization):
    times = build("discretization", discretization)(Flow(), 4, 1.0, 0.99)
    assert (times.diff() < 0).all() and times[-1] == 0.99


@each("discretization")
def test_times_are_fresh(discretization):
    # whoever changes the grid in place changes no other
    grid = build("discretization", discretization)
    grid(Cosine(), 5).zero_()
    assert (grid(Cosine(), 5).diff() < 0).all()


@pytest.mark.parametrize("steps", [2, 18, 100])
def test_karras_on_edm_is_the_papers(steps):
    # arXiv 2206.00364 Eq. 5, with σ_N = 0 appended
    i = torch.arange(steps, dtype=F64)
    sigma = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = build("discretization", "karras")(build("schedule", "edm"), steps)
    torch.testing.assert_close(80 * times[:-1], sigma, rtol=1e-11, atol=0)
    assert times[-1] == 0


@each("schedule")
def test_karras_is_regular_in_the_root_of_sigma(schedule):
    schedule = build("schedule", schedule)
    times = Karras(rho=3, sigma_min=0.01, sigma_max=7)(schedule, 12)
    ratio = torch.exp(-schedule.logsnr(times[:-1]) / 2)
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([7, 0.01], dtype=F64), rtol=1e-8, atol=0)
    steps = (ratio ** (1 / 3)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(11), rtol=1e-7, atol=0)


@each("schedule")
def test_logsnr_is_regular_in_logsnr(schedule):
    schedule = build("schedule", schedule)
    times = LogSNR()(schedule, 12)
    values = schedule.logsnr(times[:-1])
    assert values[-1].item() == pytest.approx(-2 * math.log(0.002), abs=1e-8)
    torch.testing.assert_close(values.diff(), values.diff()[:1].expand(11), rtol=1e-7, atol=0)


def test_uniform_is_regular_in_time():
    times = build("discretization", "uniform")(Cosine(), 10, 0.8, 0.3)
    torch.testing.assert_close(times, torch.tensor([0.8 - 0.05 * k for k in range(11)], dtype=F64))


@pytest.mark.parametrize("steps", [1, 3, 7, 250, 999, 1000])
def test_integer_takes_multiples_nearest_to_equal_steps(steps):
    times = Integer(1000)(Cosine(), steps)
    index = times * 1000
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    equal = torch.linspace(1000, 0, steps + 1, dtype=F64)
    assert (index - equal).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("steps", "start", "stop"), [(1001, 1.0, 0.0), (101, 0.3, 0.2), (1, 0.0003, 0.0)])
def test_integer_refuses_more_steps_than_there_are(steps, start, stop):
    with pytest.raises(DiffxError) as refusal:
        Integer(1000)(Cosine(), steps, start, stop)
    message = str(refusal.value)
    assert f"sampler.steps={steps}" in message and "discretization=uniform" in message and "\n" not in message
    if steps > 1:
        Integer(1000)(Cosine(), steps - 1, start, stop)


@pytest.mark.parametrize("discretization", choices("discretization"))
def test_grids_need_no_gradient(discretization):
    assert not build("discretization", discretization)(Cosine(), 4).requires_grad
