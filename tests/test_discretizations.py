"""Every time grid: decreasing, of K + 1 times, from the start to the stop, on every schedule."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import F64, build, complete, each
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from scipy import stats

from diffx.discretizations import Beta, Integer, Karras, Leading, Learned, Linspace, LogSNR, Quadratic, Uniform
from diffx.discretizations.learned import save
from diffx.schedules import EDM, Cosine, Flow, Laplace, Linear, Tabulated
from diffx.utils import DiffxError

torch.set_num_threads(1)

every_grid = pytest.mark.parametrize("discretization", complete("discretization"))


@each("schedule")
@every_grid
def test_a_full_grid(schedule, discretization):
    grid, schedule = build("discretization", discretization), build("schedule", schedule)
    for steps in (1, 2, 3, 18, 250):
        assert_whole(grid, schedule, steps)


def assert_whole(grid, schedule, steps):
    times = grid(schedule, steps)
    assert times.shape == (steps + 1,) and times.dtype == F64
    assert (times.diff() < 0).all()
    if not isinstance(schedule, Laplace):  # whose noisiest levels lie closer together than float32's times next to 1
        assert (times.float().diff() < 0).all()  # as a sampler in float32 takes them
    assert times[-1] == 0
    # at the largest noise level, or the largest that the grid is defined for
    if isinstance(grid, Leading):
        assert times[0] == ((steps - 1) * (1000 // steps) + 1) / 1000
        return
    limit = 2 * math.log(getattr(grid, "sigma_max", math.inf))
    assert schedule.logsnr(times[0]).item() == pytest.approx(
        max(schedule.logsnr(torch.ones((), dtype=F64)).item(), -limit), abs=1e-9
    )


PARTS = [(0.9, 0.1), (0.5, 0.0), (1.0, 0.3), (0.35, 0.34), (0.01, 0.0)]


@each("schedule")
@every_grid
def test_a_part_of_the_grid(schedule, discretization):
    grid, schedule = build("discretization", discretization), build("schedule", schedule)
    for (start, stop), counts in zip(PARTS, [(1, 7), (2, 10), (1, 10), (2, 7), (1, 10)], strict=True):
        for steps in counts:
            times = grid(schedule, steps, start, stop)
            assert times.shape == (steps + 1,)
            assert (times.diff() < 0).all()
            assert times[-1] == stop
            assert times[0] <= start
            if start < 1:
                assert times[0] == start


@every_grid
def test_a_part_wholly_beyond_the_largest_noise_level(discretization):
    times = build("discretization", discretization)(Flow(), 4, 1.0, 0.99)
    assert (times.diff() < 0).all() and times[-1] == 0.99


@every_grid
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


@pytest.mark.parametrize("grid", [Integer(1000), Leading(1000), Linspace(1000)], ids=lambda grid: type(grid).__name__)
@pytest.mark.parametrize(("steps", "start", "stop"), [(1001, 1.0, 0.0), (101, 0.3, 0.2), (1, 0.0003, 0.0)])
def test_integer_grids_refuse_more_steps_than_there_are(grid, steps, start, stop):
    with pytest.raises(DiffxError) as refusal:
        grid(Cosine(), steps, start, stop)
    message = str(refusal.value)
    assert f"sampler.steps={steps}" in message and "discretization=uniform" in message and "\n" not in message
    if steps > 1:
        assert (grid(Cosine(), steps - 1, start, stop).diff() < 0).all()


SPACINGS = {"leading": Leading(1000), "trailing": Integer(1000), "linspace": Linspace(1000)}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 18, 50, 250, 300, 999, 1000])
def test_integer_steps_are_diffusers(spacing, steps):
    # step i of diffusers, counted from 0, is t = (i + 1)/T
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = SPACINGS[spacing](Tabulated.ddpm(), steps)
    torch.testing.assert_close((scheduler.timesteps.double() + 1) / 1000, times[:-1], rtol=0, atol=1e-12)
    assert times[-1] == 0


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("steps", [2, 10, 18, 50])
def test_leading_with_an_offset_is_diffusers(steps, offset):
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    scheduler.set_timesteps(steps)
    times = Leading(1000, offset)(Tabulated.ddpm(), steps)
    torch.testing.assert_close((scheduler.timesteps.double() + 1) / 1000, times[:-1], rtol=0, atol=1e-12)
    # never beyond the noisiest step, of which all thousand leave none to spare
    assert Leading(1000, offset)(Tabulated.ddpm(), 1000)[0] == 1


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_exponential_grid_is_logsnr(steps):
    scheduler = EulerDiscreteScheduler(use_exponential_sigmas=True)
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double()
    times = LogSNR(sigma[-2].item(), sigma[0].item())(EDM(200.0), steps)
    torch.testing.assert_close(200 * times, sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_karras_is_that_of_diffusers(steps):
    scheduler = EDMEulerScheduler(sigma_schedule="karras", sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(steps)
    times = Karras()(build("schedule", "edm"), steps)
    torch.testing.assert_close(80 * times, scheduler.sigmas.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 10, 250])
def test_quadratic_is_the_papers(steps):
    # τ_i = c·i² (arXiv 2010.02502, App. D.2), with c such that the last is T
    i = torch.arange(steps, -1, -1, dtype=F64)
    torch.testing.assert_close(Quadratic()(Linear(), steps), i**2 / steps**2)
    roots = Quadratic()(Linear(), steps, 0.9, 0.1).sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(steps))


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_beta_takes_quantiles(steps):
    times = Beta(0.6, 0.9)(Linear(), steps)
    torch.testing.assert_close(stats.beta.cdf(times.numpy(), 0.6, 0.9), np.linspace(1, 0, steps + 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(Beta(1.0, 1.0)(Linear(), steps, 0.8, 0.3), Uniform()(Linear(), steps, 0.8, 0.3))


MADE_FOR = {"sampler": "DDIM", "schedule": "Cosine"}


@each("schedule")
def test_learned_times_are_noise_levels_on_any_schedule(schedule, tmp_path):
    levels = torch.tensor([-4.5, -1.5, 0.25, 4.0], dtype=F64)
    save(tmp_path / "times.json", levels, MADE_FOR)
    grid, schedule = Learned(tmp_path / "times.json"), build("schedule", schedule)
    times = grid(schedule, 4)
    assert times.shape == (5,) and times.dtype == F64 and times[-1] == 0
    torch.testing.assert_close(schedule.logsnr(times[:-1]), levels, rtol=0, atol=1e-7)
    assert not times.requires_grad


def test_learned_times_start_where_the_schedule_starts(tmp_path):
    save(tmp_path / "times.json", torch.tensor([-30.0, 0.0]), MADE_FOR)
    assert Learned(tmp_path / "times.json")(Linear(), 2)[0] == 1


@pytest.mark.parametrize("arguments", [(3,), (5,), (4, 0.9), (4, 1.0, 0.1)])
def test_learned_times_are_refused_for_anything_else(arguments, tmp_path):
    save(tmp_path / "times.json", torch.tensor([-6.0, -1.5, 0.25, 4.0]), MADE_FOR)
    with pytest.raises(DiffxError) as refusal:
        Learned(tmp_path / "times.json")(Cosine(), *arguments)
    message = str(refusal.value)
    assert "times.json" in message and "\n" not in message
    if len(arguments) == 1:
        assert "sampler.steps=4" in message


def test_learned_times_beyond_the_schedule_are_refused(tmp_path):
    save(tmp_path / "times.json", torch.tensor([-14.0, -12.0, 0.0]), MADE_FOR)
    with pytest.raises(DiffxError, match="Cosine") as refusal:
        Learned(tmp_path / "times.json")(build("schedule", "edm"), 3)
    assert "\n" not in str(refusal.value)


VALID = {"format": "diffx discretization 1", "logsnr": [-1.0, 1.0], "made_for": {}}
BAD = [
    "",
    "{",
    "[]",
    *(
        json.dumps(VALID | change)
        for change in (
            {"format": "other"},
            {"logsnr": []},
            {"logsnr": [1.0, 1.0]},
            {"logsnr": ["a"]},
            {"logsnr": None},
            {"made_for": 1},
            {"logsnr": [float("nan")]},
        )
    ),
]


@pytest.mark.parametrize("text", [*BAD, None])
def test_a_bad_file_of_times_is_refused(text, tmp_path):
    path = tmp_path / "times.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DiffxError, match=r"times\.json") as refusal:
        Learned(path)
    assert "\n" not in str(refusal.value)
    path.write_text(json.dumps(VALID))
    assert Learned(path).steps == 2


@every_grid
def test_grids_need_no_gradient(discretization):
    assert not build("discretization", discretization)(Cosine(), 4).requires_grad
