"""Learned times beat the heuristic ones on data whose denoiser is known, and are found again from their file."""

import json
from functools import lru_cache

import pytest
import torch
from conftest import F64, build, mixture, no_noise

from diffx.denoisers import Denoiser, Rescheduled
from diffx.discretizations import Karras, Learned, LogSNR, Uniform
from diffx.discretizations.learned import save
from diffx.learn_discretization import HEURISTICS, learn_discretization
from diffx.samplers import DDIM, DPMSolverPP2M
from diffx.schedules import Flow, Linear
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)


def normal(n=256, seed=0, dtype=F64):
    return Keys(seed, torch.arange(n)).normal("x", 2, dtype=dtype)


def end(denoiser, sampler, times, noise, **cond):
    _, sigma = denoiser.schedule(times[:1])
    return sampler(denoiser, noise * sigma, times, noise=no_noise, **cond)


def exact_end(denoiser, noise, **cond):
    """The samples by twice as many steps as the search's reference takes."""
    return end(denoiser, DPMSolverPP2M(), LogSNR(1e-4, 1e4)(denoiser.schedule, 512), noise, **cond)


def rms(denoiser, sampler, times, noise, exact=None, **cond):
    """The error of a grid."""
    exact = exact_end(denoiser, noise, **cond) if exact is None else exact
    return (end(denoiser, sampler, times, noise, **cond) - exact).square().mean().sqrt().item()


@lru_cache
def flow_reference():
    return exact_end(mixture(Flow()), normal(1024, 1))


# The gain over the best of uniform, karras and logsnr, measured on 1024 other samples, less a fifth. A few samples next
# to the border between two bumps carry most of the squared error, hence the many samples.
GAINS = {
    ("ddim", 5): 1.25,
    ("ddim", 8): 1.2,
    ("ddim", 12): 1.25,
    ("ddim", 20): 1.2,
    ("dpmpp_2m", 5): 1.8,
    ("dpmpp_2m", 8): 2.3,
    ("dpmpp_2m", 12): 2.5,
    ("dpmpp_2m", 20): 2.1,
}


@pytest.mark.parametrize(("sampler", "steps"), GAINS)
def test_learned_times_beat_the_best_heuristic(sampler, steps):
    denoiser, solver = mixture(Flow()), build("sampler", sampler)
    found = learn_discretization(denoiser, solver, normal(1024), steps, iterations=12, batch_size=1024)
    assert found.times.shape == (steps + 1,) and (found.times.diff() < 0).all() and found.times[-1] == 0
    # on noise of another seed, which neither half of the search has seen
    noise, exact = normal(1024, 1), flow_reference()
    errors = {
        name: rms(denoiser, solver, times, noise, exact)
        for name, times in {
            "learned": found.times,
            **{name: grid(denoiser.schedule, steps) for name, grid in HEURISTICS.items()},
        }.items()
    }
    best = min(errors[name] for name in ("uniform", "karras", "logsnr"))
    assert errors["learned"] * GAINS[sampler, steps] < best
    assert found.report["nfe"] == found.report["steps"] == steps


@pytest.mark.parametrize("schedule", ["cosine", "edm", "linear"])
def test_every_schedule_gains(schedule):
    found = learn_discretization(mixture(build("schedule", schedule)), DPMSolverPP2M(), normal(128), 6, iterations=8)
    errors = found.report["rms"]
    assert errors["learned"] * 2 < min(errors[name] for name in HEURISTICS)


def test_the_report_is_measured_on_the_half_that_is_not_fitted():
    denoiser, noise = mixture(Flow()), normal(64)
    found = learn_discretization(denoiser, DDIM(), noise, 4, iterations=5)
    assert found.report["rms"]["learned"] == pytest.approx(rms(denoiser, DDIM(), found.times, noise[32:]), rel=1e-2)
    changed = torch.cat([noise[:32], normal(32, seed=5)])
    again = learn_discretization(denoiser, DDIM(), changed, 4, iterations=5)
    assert again.times.equal(found.times)
    assert again.report["rms"]["learned"] != found.report["rms"]["learned"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_is_deterministic_and_blind_to_batches(dtype):
    denoiser, noise = mixture(Flow(), dtype), normal(64, dtype=dtype)
    found = learn_discretization(denoiser, DPMSolverPP2M(), noise, 4, iterations=3)
    again = learn_discretization(denoiser, DPMSolverPP2M(), noise, 4, iterations=3)
    assert again.times.equal(found.times) and again.report == found.report
    batched = learn_discretization(denoiser, DPMSolverPP2M(), noise, 4, iterations=3, batch_size=20)
    atol = 1e-6 if dtype == F64 else 0.05  # of finite differences of rounded samples
    torch.testing.assert_close(batched.logsnr, found.logsnr, rtol=0, atol=atol)


def test_single_precision_is_enough():
    exact = learn_discretization(mixture(Flow()), DPMSolverPP2M(), normal(128), 6, iterations=12)
    rounded = learn_discretization(
        mixture(Flow(), torch.float32), DPMSolverPP2M(), normal(128, dtype=torch.float32), 6, iterations=12
    )
    assert rounded.report["rms"]["learned"] < 1.1 * exact.report["rms"]["learned"]
    assert (rounded.times.float().diff() < 0).all()


def test_conditions_go_with_their_samples():
    denoiser, noise, label = mixture(Flow()), normal(64), torch.arange(64) % 3
    found = learn_discretization(denoiser, DDIM(), noise, 4, iterations=5, batch_size=9, label=label)
    expected = rms(denoiser, DDIM(), found.times, noise[32:], label=label[32:])
    assert found.report["rms"]["learned"] == pytest.approx(expected, rel=1e-2)
    assert not learn_discretization(denoiser, DDIM(), noise, 4, iterations=5).times.equal(found.times)


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps):
    found = learn_discretization(mixture(Flow()), DDIM(), normal(64), steps, iterations=8)
    errors = found.report["rms"]
    assert len(found.times) == steps + 1
    assert errors["learned"] < min(errors[name] for name in HEURISTICS) * 1.05


class Counting(Denoiser):
    """Counts its calls."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.calls = denoiser, denoiser.schedule, 0

    def forward(self, x_t, t, **cond):
        self.calls += 1
        return self.denoiser(x_t, t, **cond)


def test_it_costs_what_it_says():
    denoiser = Counting(mixture(Flow()))
    learn_discretization(denoiser, DPMSolverPP2M(), normal(32), 6, iterations=4, reference_steps=100)
    assert denoiser.calls < 8 / 3 * 4 * 6 * (6 + 2) + 80 * 6 + 2 * 100


def test_the_file_gives_the_times_back_on_any_schedule(tmp_path):
    denoiser = mixture(Flow())
    found = learn_discretization(denoiser, DPMSolverPP2M(), normal(128), 6, iterations=8)
    save(tmp_path / "times.json", found.logsnr, found.report)
    grid = build("discretization", "learned", path=str(tmp_path / "times.json"))
    assert isinstance(grid, Learned)
    torch.testing.assert_close(grid(denoiser.schedule, 6), found.times, rtol=0, atol=1e-12)
    assert grid.made_for == found.report == json.loads((tmp_path / "times.json").read_text())["made_for"]
    # DPM-Solver++ sees noise levels alone: on another schedule, where these are, it makes the same samples
    other = Rescheduled(denoiser, Linear(beta_max=40.0))
    expected = found.report["rms"]["learned"]
    assert rms(other, DPMSolverPP2M(), grid(other.schedule, 6), normal(128)[64:]) == pytest.approx(expected, rel=0.02)
    assert rms(other, DPMSolverPP2M(), Karras()(other.schedule, 6), normal(128)[64:]) > 2 * expected


def test_heuristics_are_the_defaults():
    assert [type(grid) for grid in HEURISTICS.values()] == [Uniform, Karras, LogSNR]


@pytest.mark.parametrize("sampler", ["ddpm", DDIM(eta=1.0)])
def test_a_stochastic_sampler_is_refused_before_it_costs_anything(sampler):
    denoiser = Counting(mixture(Linear()))
    with pytest.raises(DiffxError, match="deterministic") as refusal:
        learn_discretization(denoiser, build("sampler", sampler) if sampler == "ddpm" else sampler, normal(8), 5)
    assert "\n" not in str(refusal.value)
    assert denoiser.calls <= 2


def test_one_sample_is_too_few():
    with pytest.raises(DiffxError, match="2 samples"):
        learn_discretization(mixture(Flow()), DDIM(), normal(1), 5)
