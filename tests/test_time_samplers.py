"""Training times: their density, and the same time for the same sample on any number of ranks."""

import math

import pytest
import torch
from conftest import F64, build, choices, each
from scipy import stats

from diffx.schedules import Flow
from diffx.time_samplers import LogNormal, Stratified, Uniform
from diffx.utils import Keys

N = 8192


def times_of(sampler, schedule, n=N, seed=0, first=0, total=None):
    return sampler(schedule, Keys(seed, torch.arange(first, first + n), total=total))


@each("schedule")
@each("time_sampler")
def test_times_lie_in_the_unit_interval(schedule, time_sampler):
    t, correction = times_of(build("time_sampler", time_sampler), build("schedule", schedule))
    assert t.shape == correction.shape == (N,)
    assert t.dtype == correction.dtype == torch.float32
    assert (t > 0).all() and (t <= 1).all()
    assert correction.isfinite().all() and (correction > 0).all()
    assert not t.requires_grad


@each("schedule")
@each("time_sampler")
@pytest.mark.parametrize("world", [2, 8])
def test_the_world_size_changes_nothing(schedule, time_sampler, world):
    sampler, schedule = build("time_sampler", time_sampler), build("schedule", schedule)
    for batch in range(3):  # of 64, the third one starting at sample 128
        whole, _ = times_of(sampler, schedule, 64, first=64 * batch, total=64)
        share = 64 // world
        parts = [
            times_of(sampler, schedule, share, first=64 * batch + share * rank, total=64)[0] for rank in range(world)
        ]
        assert torch.cat(parts).equal(whole)


@each("time_sampler")
def test_times_depend_on_seed_and_sample_alone(time_sampler):
    sampler = build("time_sampler", time_sampler)
    t, _ = times_of(sampler, Flow(), 64, total=64)
    assert t.equal(times_of(sampler, Flow(), 64, total=64)[0])
    assert not (t == times_of(sampler, Flow(), 64, seed=1, total=64)[0]).any()
    assert not (t == times_of(sampler, Flow(), 64, first=64, total=64)[0]).any()


@pytest.mark.parametrize("sampler", [Uniform(), Uniform(0.2), Stratified(), Stratified(0.2)])
def test_uniform_densities(sampler):
    t, correction = times_of(sampler, Flow(), total=64)
    # of a stratified sampler, one sample of each of N/64 batches is independent
    draws = t if isinstance(sampler, Uniform) else t.reshape(-1, 64)[torch.arange(128), torch.arange(128) % 64]
    assert stats.kstest(draws, stats.uniform(sampler.t_min, 1 - sampler.t_min).cdf).pvalue > 0.01
    assert (correction == 1).all()


@pytest.mark.parametrize("total", [1, 7, 64, 256])
def test_stratified_has_one_per_stratum_of_each_global_batch(total):
    t, _ = times_of(Stratified(0.0), Flow(), 4 * total, total=total)
    strata = (t.double() * total).floor().long().reshape(4, total)
    assert strata.sort(1).values.equal(torch.arange(total).expand(4, total))
    # each is uniform over its cell
    _, within = times_of(Stratified(0.0), Flow(), N, total=total)[0], times_of(Stratified(0.0), Flow(), N, total=total)
    assert stats.kstest((within[0].double() * total) % 1, "uniform").pvalue > 0.01


def test_stratified_varies_less():
    def spread(sampler):
        t, _ = times_of(sampler, Flow(), 64 * 100, total=64)
        return t.square().reshape(100, 64).mean(1).std()

    assert spread(Stratified()) < spread(Uniform()) / 10


def test_lognormal_on_edm_is_the_papers():
    t, correction = times_of(build("time_sampler", "lognormal"), build("schedule", "edm"))
    assert stats.kstest((80 * t.double()).log(), stats.norm(-1.2, 1.2).cdf).pvalue > 0.01
    assert (correction == 1).all()


@each("schedule")
def test_lognormal_is_one_density_of_noise_levels_on_all_schedules(schedule):
    schedule = build("schedule", schedule)
    t, _ = times_of(LogNormal(0.5, 1.5), schedule)
    values = -schedule.logsnr(t.double()) / 2
    end = -schedule.logsnr(torch.ones((), dtype=F64)).item() / 2
    assert values.max() <= end + 1e-6
    # what lies beyond the end goes there
    inside = values[t < 1]
    share = stats.norm.cdf((end - 0.5) / 1.5)
    assert abs(len(inside) / N - share) < 4 * math.sqrt(share * (1 - share) / N) + 1e-3
    assert stats.kstest(inside, stats.truncnorm(-math.inf, (end - 0.5) / 1.5, 0.5, 1.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("time_sampler", choices("time_sampler"))
def test_times_of_a_learned_schedule_carry_no_gradient(time_sampler):
    class Learned(Flow):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, t):
            return (1 - t) * self.shift.exp(), t.clone()

        def inverse(self, logsnr):
            return torch.sigmoid(self.shift - logsnr / 2)

    assert not times_of(build("time_sampler", time_sampler), Learned(), 4)[0].requires_grad
