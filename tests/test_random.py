"""Keyed random numbers: the published generator, the same bits for a sample in any batch, honest statistics."""

import hashlib

import pytest
import torch
from scipy import stats

from diffx.utils import Keys
from diffx.utils.random import _GAMMA, _address, _positions, mix64, permutation

N = 20000


def unsigned(value):
    return int(value) % 2**64


def test_mix64_gives_the_published_sequence_of_splitmix64():
    # the reference implementation's output for seed 0: mix of 1, 2, 3 … times the golden gamma
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert [unsigned(v) for v in mix64(torch.arange(1, 6) * _GAMMA)] == published


def test_mix64_leaves_its_argument_alone():
    z = torch.arange(5)
    mix64(z)
    assert z.equal(torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7, 9), (3, 16, 16)])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_numbers_of_a_sample_do_not_depend_on_the_batch(batch, shape, dtype):
    whole = Keys(7, torch.arange(50), step=3)
    parts = [Keys(7, torch.arange(50)[i : i + batch], step=3) for i in range(0, 50, batch)]
    for kind in ("normal", "uniform"):
        together = getattr(whole, kind)("noise", *shape, dtype=dtype)
        apart = torch.cat([getattr(part, kind)("noise", *shape, dtype=dtype) for part in parts])
        assert together.shape == (50, *shape)
        assert together.dtype == dtype
        assert together.equal(apart)


def test_any_order_and_repetition_of_samples():
    index = torch.tensor([41, 3, 3, 10**12, 0])
    drawn = Keys(1, index).normal("noise", 9)
    for row, number in zip(drawn, index, strict=True):
        assert row.equal(Keys(1, number[None]).normal("noise", 9)[0])


def test_every_part_of_the_address_counts():
    def bits(seed=0, index=0, step=0, stream="a"):
        return Keys(seed, torch.tensor([index]), step).bits(stream, 64)[0]

    others = [bits(seed=1), bits(index=1), bits(step=1), bits(stream="b"), bits().roll(1)]
    assert bits().equal(Keys(0, torch.tensor([0]), 5).at(0).bits("a", 64)[0])
    for other in others:
        assert not (bits() == other).any()


def test_bits_are_fixed_for_all_time():
    # a change of the generator would silently change every published sample
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def bits(seed, stream, sample, step, position):
        stream = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest(), "little")
        golden = 0x9E3779B97F4A7C15
        return mix(mix((sample + stream) * golden % 2**64) ^ mix((position + 1) * golden % 2**64))

    drawn = Keys(5, torch.tensor([0, 2**40]), 17).bits("noise", 3)
    assert [[unsigned(v) for v in row] for row in drawn] == [
        [bits(5, "noise", sample, 17, position) for position in range(3)] for sample in (0, 2**40)
    ]
    assert unsigned(Keys(0, torch.tensor([0])).bits("noise", 1)) == 0xF21940F859D7EE8D


def test_moments_and_distribution_of_normal_numbers():
    x = Keys(0, torch.arange(N)).normal("noise", 8, dtype=torch.float64)
    n = x.numel()
    # four standard errors of each moment
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(x.pow(3).mean()) < 4 * (15 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(x.flatten(), "norm").pvalue > 0.01
    assert x.abs().max() < 6.8


def test_distribution_of_uniform_numbers():
    u = Keys(0, torch.arange(N)).uniform("time", 8, dtype=torch.float64)
    assert stats.kstest(u.flatten(), "uniform").pvalue > 0.01
    # the successive digits too: a poor generator is poor in its low ones
    assert stats.kstest((u.flatten() * 2**16) % 1, "uniform").pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uniform_numbers_stay_inside_the_open_interval(dtype):
    from diffx.utils.random import _unit

    extremes = torch.tensor([-(2**31), 2**31 - 1])
    u = _unit(extremes, 32, dtype)
    assert (u > 0).all() and (u < 1).all()
    assert u.dtype == dtype


@pytest.mark.parametrize(
    "pair",
    [
        lambda n: (Keys(0, torch.arange(n)), "a", Keys(0, torch.arange(1, n + 1)), "a"),
        lambda n: (Keys(0, torch.arange(n)), "a", Keys(0, torch.arange(n)), "b"),
        lambda n: (Keys(0, torch.arange(n), 0), "a", Keys(0, torch.arange(n), 1), "a"),
        lambda n: (Keys(0, torch.arange(n)), "a", Keys(1, torch.arange(n)), "a"),
    ],
    ids=["samples", "streams", "steps", "seeds"],
)
def test_neighbours_are_uncorrelated(pair):
    keys, stream, other_keys, other_stream = pair(N)
    x = keys.normal(stream, 6, dtype=torch.float64)
    y = other_keys.normal(other_stream, 6, dtype=torch.float64)
    bound = 4.5 / N**0.5  # of 36 correlations of standard error 1/√N
    assert (x.T @ y / N).abs().max() < bound
    assert ((x.square() - 1).T @ (y.square() - 1) / N / 2).abs().max() < bound


def test_positions_are_uncorrelated():
    x = Keys(0, torch.arange(N)).normal("noise", 12, dtype=torch.float64)
    bound = 4.5 / N**0.5
    off = x.T @ x / N - torch.eye(12, dtype=torch.float64)
    assert off.fill_diagonal_(0).abs().max() < bound
    # cosine and sine of one angle share a radius: their squares would show a shared one between pairs
    squares = (x.square() - 1).T @ (x.square() - 1) / N / 2
    assert squares.fill_diagonal_(0).abs().max() < bound


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_permutation_is_one(n):
    order = permutation(0, "epoch", 3, n)
    assert order.sort().values.equal(torch.arange(n))
    assert order.equal(permutation(0, "epoch", 3, n))


def test_permutation_differs_by_seed_stream_and_epoch_and_is_fair():
    first = permutation(0, "epoch", 0, 1000)
    for other in (permutation(1, "epoch", 0, 1000), permutation(0, "x", 0, 1000), permutation(0, "epoch", 1, 1000)):
        assert (first == other).sum() < 10  # one agreement is expected
    # where element 0 goes over many epochs
    places = torch.stack([permutation(0, "epoch", e, 10) for e in range(2000)]).argmin(1)
    assert stats.chisquare(torch.bincount(places, minlength=10)).pvalue > 0.01


def test_total_is_the_batch_unless_given():
    assert Keys(0, torch.arange(5)).total == 5
    assert Keys(0, torch.arange(5), total=20).at(3).total == 20
    assert len(Keys(0, torch.arange(5), total=20)) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree_on_the_bits():
    here, there = Keys(3, torch.arange(100)), Keys(3, torch.arange(100).cuda())
    assert here.bits("a", 1000).equal(there.bits("a", 1000).cpu())
    torch.testing.assert_close(here.normal("a", 1000), there.normal("a", 1000).cpu(), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize(("count", "samples"), [(1, 1), (7, 3), (512, 64)])
def test_the_host_draws_by_numpy_what_a_device_draws_by_torch(count, samples):
    keys = Keys(-5, torch.arange(samples) * 10**12 - 7, step=3)
    start, positions = _address(-5, "noise", 3), _positions(count, torch.device("cpu"))
    address = mix64((keys.index + start) * _GAMMA)
    assert keys.bits("noise", count).equal(mix64(address[:, None] ^ positions))
