"""Training times: their density, and the same time for the same sample on any number of ranks."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import F64, build, choices, each
from scipy import special, stats

from diffx.denoisers import Preconditioned
from diffx.objectives import Denoising
from diffx.parameterizations import X0
from diffx.schedules import Cosine, Flow
from diffx.time_samplers import (
    Adaptive,
    CosineMap,
    Importance,
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    Mode,
    Stratified,
    Uniform,
)
from diffx.utils import DiffxError, Keys
from diffx.weightings import Constant

torch.set_num_threads(1)

N = 8192


def times_of(sampler, schedule, n=N, seed=0, first=0, total=None):
    return sampler(schedule, Keys(seed, torch.arange(first, first + n), total=total))


@each("schedule")
@each("time_sampler")
def test_times_lie_in_the_unit_interval(schedule, time_sampler):
    t, correction = times_of(build("time_sampler", time_sampler), build("schedule", schedule), 512)
    assert t.shape == correction.shape == (512,)
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
    schedule, n = build("schedule", schedule).requires_grad_(False), 1024
    t, _ = times_of(LogNormal(0.5, 1.5), schedule, n)
    values = -schedule.logsnr(t.double()) / 2
    # 1 and what float32 rounds to it
    end = -schedule.logsnr(torch.tensor(1 - 2**-25, dtype=F64)).item() / 2
    inside = values[t < 1]
    assert inside.max() <= end + 1e-6
    # what lies beyond the end goes there
    share = stats.norm.cdf((end - 0.5) / 1.5)
    assert abs(len(inside) / n - share) < 4 * math.sqrt(share * (1 - share) / n) + 1e-3
    assert stats.kstest(inside, stats.truncnorm(-math.inf, (end - 0.5) / 1.5, 0.5, 1.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("total", [1, 7, 64, 250])
def test_low_discrepancy_is_one_comb_per_global_batch(total):
    t, correction = times_of(LowDiscrepancy(0.0), Flow(), 3 * total, total=total)
    for comb in t.double().reshape(3, total):
        gaps = comb.sort().values.diff(append=comb.min().reshape(1) + 1)
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / total), rtol=0, atol=2e-7)
    assert (correction == 1).all()
    # the offset is uniform, and so is every sample's time
    offsets = times_of(LowDiscrepancy(0.0), Flow(), total=1)[0] if total == 1 else t
    first = torch.tensor([times_of(LowDiscrepancy(0.0), Flow(), 1, seed, total - 1, total)[0] for seed in range(200)])
    for draws in (offsets, first):
        assert stats.kstest(draws, "uniform").pvalue > 0.01


def test_low_discrepancy_varies_less():
    def spread(sampler):
        t, _ = times_of(sampler, Flow(), 64 * 100, total=64)
        return t.square().reshape(100, 64).mean(1).std()

    assert spread(LowDiscrepancy()) < spread(Uniform()) / 5


def mode_cdf(s):
    # of arXiv 2403.03206 Eq. 20, as printed
    u = torch.linspace(0, 1, 20001, dtype=F64)
    t = 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return stats.rv_histogram(((u.diff().abs() / t.diff().abs()).flip(0), t.flip(0)), density=True).cdf


DENSITIES = {
    LogitNormal(0.0, 1.0): lambda t: stats.norm.cdf(special.logit(t)),
    LogitNormal(-0.5, 0.6): lambda t: stats.norm(-0.5, 0.6).cdf(special.logit(t)),
    Mode(1.29): mode_cdf(1.29),
    Mode(-0.9): mode_cdf(-0.9),
    Mode(0.0): stats.uniform.cdf,
    # the integral of 2/(π − 2πt + 2πt²)
    CosineMap(): lambda t: 0.5 + 2 / math.pi * np.arctan(2 * np.asarray(t) - 1),
}


@pytest.mark.parametrize("sampler", DENSITIES, ids=lambda sampler: type(sampler).__name__)
def test_densities_of_stable_diffusion_3(sampler):
    t, correction = times_of(sampler, Cosine())
    assert stats.kstest(t.double(), DENSITIES[sampler]).pvalue > 0.01
    assert (correction == 1).all()


@pytest.mark.parametrize("scale", [-1.01, 1.76])
def test_a_mode_that_is_no_density_is_refused(scale):
    with pytest.raises(DiffxError, match=r"time_sampler\.scale") as refusal:
        Mode(scale)
    assert "\n" not in str(refusal.value)
    Mode(-1.0), Mode(1.75)


def test_logit_normal_on_the_flow_schedule_is_lognormal():
    torch.testing.assert_close(times_of(LogitNormal(0.3, 0.8), Flow())[0], times_of(LogNormal(0.3, 0.8), Flow())[0])
    assert not times_of(LogitNormal(0.3, 0.8), Cosine())[0].allclose(times_of(LogNormal(0.3, 0.8), Cosine())[0])


def test_cosine_map_on_flow_has_the_noise_levels_of_a_cosine_schedule():
    t, _ = times_of(CosineMap(), Flow())
    u = Keys(0, torch.arange(N)).uniform("time", dtype=F64)
    torch.testing.assert_close(Flow().logsnr(t.double()), -2 * torch.log(torch.tan(math.pi / 2 * u)), rtol=0, atol=2e-3)


ADAPTIVE = {
    "importance": lambda: Importance(bins=20, history=10),
    "adaptive": lambda: Adaptive(bins=60, decay=0.9),
}
every_adaptive = pytest.mark.parametrize("name", ADAPTIVE)
SCHEDULES = {"flow": Flow(), "cosine": Cosine(), "edm": build("schedule", "edm")}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def profile(t):
    """A loss that differs by four orders of magnitude between noise levels."""
    return 0.01 + 100 * torch.exp(-((t - 0.3) ** 2) / 0.002)


def trained(sampler, schedule, steps=40, total=64, world=1, accumulate=1, spread=0.5):
    """The sampler after some steps of a known loss, with the global batch cut into parts, and the times drawn."""
    drawn = [torch.empty(0)]
    for step in range(steps):
        for part in torch.arange(step * total, (step + 1) * total).chunk(accumulate):
            keys = Keys(0, part, total=total)
            t, _ = sampler(schedule, keys)
            # the loss of a sample, not of its time alone
            sampler.update(t, profile(t) * (1 + spread * keys.normal("loss")).abs())
            drawn.append(t)
    return sampler, torch.cat(drawn)


@every_adaptive
@every_schedule
@pytest.mark.parametrize("steps", [0, 40])
def test_the_correction_makes_the_mean_that_of_uniform_times(name, schedule, steps):
    sampler, _ = trained(ADAPTIVE[name](), schedule, steps)
    grid = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    # of large numbers, so few that all are of one density: the next step's
    keys = Keys(1, torch.arange(10**9, 10**9 + 200_000), total=10**9)
    t, correction = (value.double() for value in sampler(schedule, keys))
    for f in (torch.ones_like, torch.square, lambda t: torch.cos(7 * t), profile):
        values = correction * f(t)
        assert abs(values.mean() - f(grid).mean()) < 4.5 * values.std() / math.sqrt(len(t)) + 1e-4
    if steps:
        assert not correction.allclose(torch.ones_like(correction), atol=0.5)


@every_adaptive
@every_schedule
def test_the_variance_is_lower_on_a_known_loss(name, schedule):
    sampler, _ = trained(ADAPTIVE[name](), schedule)
    keys = Keys(1, torch.arange(10**9, 10**9 + 20_000), total=10**9)

    def spread(sampler):
        t, correction = sampler(schedule, keys)
        return (correction * profile(t)).std()

    assert spread(sampler) < spread(Uniform()) / 2.5


def test_importance_is_the_root_of_the_second_moment_of_the_last_losses():
    sampler = Importance(bins=4, history=3, uniform=0.02, t_min=0.0)
    centres = torch.tensor([0.125, 0.375, 0.625, 0.875])
    keys = Keys(0, torch.arange(4), total=4)

    def told(step, values):
        """The density of a step, after which these losses come, one list for each bin."""
        _, _ = sampler(Flow(), Keys(0, torch.arange(4 * step, 4 * step + 4), total=4))
        probability = sampler.probability.clone()
        for j, losses in enumerate(values):
            if losses:
                sampler.update(centres[j].expand(len(losses)), torch.tensor(losses))
        return probability

    even = torch.full((4,), 0.25, dtype=F64)
    # five in one bin at a time: the last three count
    assert told(0, [[9.0, 9.0, 1.0, 2.0, 2.0], [3.0, 3.0], [1.0, 1.0, 1.0], []]).equal(even)
    assert told(1, [[], [3.0], [], [0.0, 0.0]]).equal(even)  # the last bin has none yet
    assert told(2, [[], [], [], [0.0]]).equal(even)
    root = torch.tensor([math.sqrt(3), 3, 1, 0], dtype=F64)
    expected = 0.98 * root / root.sum() + 0.02 / 4
    torch.testing.assert_close(told(3, [[], [], [4.0, 4.0], []]), expected)
    root[2] = math.sqrt((1 + 16 + 16) / 3)
    torch.testing.assert_close(told(4, [[], [], [], []]), 0.98 * root / root.sum() + 0.02 / 4)
    t, correction = sampler(Flow(), keys.at(0))
    j = (t * 4).long()
    torch.testing.assert_close(correction.double(), 0.25 / sampler.probability[j], rtol=1e-6, atol=0)


@every_schedule
def test_adaptive_draws_bins_by_their_share_of_the_loss(schedule):
    sampler, _ = trained(ADAPTIVE["adaptive"](), schedule, steps=150, spread=0.0)
    t, _ = sampler(schedule, Keys(1, torch.arange(10**9, 10**9 + 50_000), total=10**9))
    # E over uniform times of the loss, by bins of logSNR, is the density
    grid = (torch.arange(400_000, dtype=F64) + 0.5) / 400_000
    edges = sampler.edges
    assert schedule.logsnr(edges[:-1]).diff().std() < 1e-4  # equal bins of logSNR
    shares = torch.bincount(torch.bucketize(grid, edges[1:-1]), profile(grid), 60)
    drawn = torch.bincount(torch.bucketize(t.double(), edges[1:-1]), minlength=60) / len(t)
    large = shares / shares.sum() > 0.05
    assert large.sum() >= 2
    torch.testing.assert_close(drawn[large].double(), (shares / shares.sum())[large], rtol=0.25, atol=0)


@every_adaptive
def test_feedback_waits_for_the_next_optimizer_step(name):
    sampler, _ = trained(ADAPTIVE[name](), Flow())
    keys = Keys(0, torch.arange(40 * 64, 41 * 64), total=64)
    t, correction = sampler(Flow(), keys)
    sampler.update(t, 1000 * t)
    again = sampler(Flow(), keys)
    assert again[0].equal(t) and again[1].equal(correction)
    later = Keys(0, torch.arange(41 * 64, 42 * 64), total=64)
    fresh, _ = trained(ADAPTIVE[name](), Flow())
    fresh(Flow(), keys)
    assert not sampler(Flow(), later)[0].equal(fresh(Flow(), later)[0])


@every_adaptive
@pytest.mark.parametrize("accumulate", [2, 16])
def test_micro_batches_change_nothing(name, accumulate):
    whole, times = trained(ADAPTIVE[name](), Flow())
    parts, same = trained(ADAPTIVE[name](), Flow(), accumulate=accumulate)
    assert len(times.unique()) > 1000
    torch.testing.assert_close(same, times, rtol=0, atol=0 if name == "importance" else 1e-6)
    for (key, value), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0 if name == "importance" else 1e-9, atol=0, msg=key)


@every_adaptive
def test_the_state_is_kept_bit_for_bit(name, tmp_path):
    reference, _ = trained(ADAPTIVE[name](), Cosine())
    objective = Denoising(reference, Constant())
    torch.save(objective.state_dict(), tmp_path / "state")
    resumed = ADAPTIVE[name]()
    Denoising(resumed, Constant()).load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(40, 43):
        keys = Keys(0, torch.arange(64 * step, 64 * step + 64), total=64)
        for a, b in zip(reference(Cosine(), keys), resumed(Cosine(), keys), strict=True):
            assert a.equal(b)
        t, _ = reference(Cosine(), keys)
        reference.update(t, profile(t))
        resumed.update(t, profile(t))
    for a, b in zip(reference.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert a.equal(b)


@every_adaptive
def test_the_objective_gives_feedback_in_training_only(name):
    class Zero(torch.nn.Module):
        def forward(self, x, logsnr):
            return torch.zeros_like(x)

    sampler = ADAPTIVE[name]()
    objective, denoiser = Denoising(sampler, Constant()), Preconditioned(Zero(), Cosine(), X0())
    keys = Keys(0, torch.arange(8))
    before = {key: value.clone() for key, value in sampler.state_dict().items()}
    objective.eval()(denoiser, torch.ones(8, 3), keys)
    differ = {key for key, value in sampler.state_dict().items() if not value.equal(before[key])}
    assert differ <= {"batch"}
    x = torch.arange(8.0)[:, None].expand(8, 3)
    terms = objective.train()(denoiser, x, keys)
    _, correction = sampler(Cosine(), keys)
    expected = torch.arange(8.0) ** 2
    torch.testing.assert_close(terms["loss"], expected * correction)
    # what was told is the loss without the correction
    told = sampler.history.sum() if name == "importance" else sampler.sums[0].sum().float()
    torch.testing.assert_close(told, expected.sum())


def _rank(rank, folder, name):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    sampler, drawn = ADAPTIVE[name](), []
    for step in range(20):
        for micro in range(2):  # of 16 samples on each of 2 ranks
            first = step * 64 + (micro * 2 + rank) * 16
            keys = Keys(0, torch.arange(first, first + 16), total=64)
            t, _ = sampler(Cosine(), keys)
            sampler.update(t, profile(t) * (1 + 0.5 * keys.normal("loss")).abs())
            drawn.append(t)
    torch.save({"times": torch.cat(drawn), **sampler.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@every_adaptive
def test_two_ranks_draw_what_one_draws(name, tmp_path):
    # forked: a spawned process would spend ten seconds on imports
    processes = mp.start_processes(_rank, (str(tmp_path), name), nprocs=2, join=False, start_method="fork")
    while not processes.join():
        pass
    reference, times = trained(ADAPTIVE[name](), Cosine(), steps=20)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    shares = [rank.pop("times").reshape(20, 2, 16) for rank in (first, second)]
    together = torch.stack(shares, dim=2).flatten()  # step, micro-batch, rank, sample
    torch.testing.assert_close(together, times, rtol=0, atol=0 if name == "importance" else 1e-6)
    for key, value in reference.state_dict().items():
        assert first[key].equal(second[key])
        torch.testing.assert_close(first[key], value, rtol=0 if name == "importance" else 1e-9, atol=0)


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
