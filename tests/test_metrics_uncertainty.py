"""Standard errors, biases and intervals: as they are in repeated draws of samples."""

import math

import numpy as np
import pytest
import torch
from metrics_support import normal, observation, reference_of, statistics_of
from torch import Tensor

from diffx.metrics import (
    BLOCKS,
    ClassConsistency,
    ClipMMD,
    Effect,
    FrechetDistance,
    FrechetInfinity,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    Statistics,
    Value,
    paired,
)
from diffx.metrics.values import bias_at, block_of, jackknife, limit, unions
from diffx.utils import DiffxError

torch.set_num_threads(1)


def measured(metric, features: Tensor, logits: Tensor | None = None) -> Value:
    metric.reset()
    metric.update(observation(features, logits))
    return metric.compute()[0]


def within(hits: list[bool], nominal: float, most: float = 1.0) -> None:
    """The share of hits is not below the nominal rate, nor above `most`, by 2.6 binomial standard errors: 1 in 100."""
    share, error = np.mean(hits), 2.6 * math.sqrt(nominal * (1 - nominal) / len(hits))
    print(share, error)
    assert nominal - error <= share <= most, share


# ----- blocks


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 1000])
def test_every_block_holds_every_class_alike(classes):
    index = torch.arange(classes * 1000)
    table = torch.bincount(index % classes * BLOCKS + block_of(index), minlength=classes * BLOCKS)
    # classes are dealt out in turn: leaving a block out must not leave a class out
    assert table.min() >= 60
    assert table.max() <= 140


def test_blocks_follow_the_sample_number():
    features = normal(30, 3, seed=1)
    metric = FrechetDistance(reference_of(30, statistics=statistics_of(normal(60, 3, seed=2))))
    metric.update(observation(features))
    moments = metric.moments.totals()
    assert moments.count.tolist() == [3] * BLOCKS
    expected = features[block_of(torch.arange(30)) == 4].sum(dim=0) - 3 * moments.centre
    torch.testing.assert_close(moments.first[4], expected)


def test_unions_leave_out_their_own_block_first():
    for size in (5, 9):
        rows = unions(10, size)
        assert rows.sum(dim=1).tolist() == rows.sum(dim=0).tolist() == [size] * 10
        assert not rows.diagonal().any()
    assert unions(0, -1).shape == (0, 0)


# ----- the jackknife


def test_jackknife_of_a_mean_is_the_standard_error_of_the_mean():
    x = normal(10, 1, seed=5)[:, 0]
    without = (x.sum() - x) / 9
    assert jackknife(without) == pytest.approx((x.std() / math.sqrt(10)).item(), rel=1e-12)
    assert jackknife(without[:1]) is None
    assert jackknife(torch.tensor([1.0, math.nan])) is None


def test_the_bias_of_a_parabola_in_1_over_n_is_exact():
    at = [3.0 + 0.7 / k - 2.0 / k**2 for k in (10, 9, 5)]
    value, without, halves = at[0], *(torch.full((10,), x, dtype=torch.float64) for x in at[1:])
    assert bias_at(value, without, halves) == pytest.approx(value - 3.0, rel=1e-9)
    assert bias_at(value, without[:3], halves) is None
    assert bias_at(math.nan, without, halves) is None


@pytest.mark.parametrize(
    ("make", "shift", "least", "most"),
    [("frechet", 0.3, 0.8, 1.25), ("score", 0.8, 0.8, 1.25), ("frechet", 0.0, 1.0, 2.0), ("score", 0.0, 1.0, 2.0)],
    ids=["distance", "score", "distance near its minimum", "score near its maximum"],
)
def test_jackknife_matches_the_spread_over_repeated_draws(make: str, shift: float, least: float, most: float):
    n, dim, draws = 300, 4, 150
    reference = reference_of(n, statistics=statistics_of(normal(5000, dim, seed=1)), logits=dim)
    metric = FrechetDistance(reference) if make == "frechet" else InceptionScore(reference)
    values = []
    for draw in range(draws):
        x = normal(n, dim, seed=100 + draw) * (1 + shift) + shift * torch.arange(dim)
        values.append(measured(metric, x, 6 * x))
    spread = np.std([v.value for v in values], ddof=1)
    told = math.sqrt(np.mean(np.square([v.stderr for v in values])))
    assert least < told / spread < most


# ----- coverage


def gaussian(dim: int, shift: float, scale: float) -> tuple[Statistics, Tensor, float]:
    """A population, the shift of another one, and the squared Fréchet distance between them."""
    move = torch.full((dim,), shift / math.sqrt(dim), dtype=torch.float64)
    spread = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    distance = shift**2 + ((scale - 1) * spread).square().sum().item()
    return Statistics(torch.zeros(dim).double(), spread.square().diag()), move, distance


@pytest.mark.parametrize("kind", [FrechetDistance, FrechetInfinity])
@pytest.mark.parametrize(
    ("shift", "scale", "most"),
    [(1.0, 1.2, 0.98), (0.3, 1.1, 0.985), (0.0, 1.0, 1.0)],
    ids=["far", "near", "equal"],
)
def test_the_interval_covers_the_distance_of_the_populations(kind: type, shift: float, scale: float, most: float):
    n, dim, draws = 500, 8, 300
    population, move, distance = gaussian(dim, shift, scale)
    metric = kind(reference_of(n, statistics=population))
    values = [
        measured(metric, move + normal(n, dim, seed=1000 + draw) * scale * population.cov.diagonal().sqrt())
        for draw in range(draws)
    ]
    # where the distance is 0 its linear part is, and the jackknife errs on the safe side
    within([v.interval[0] <= distance <= v.interval[1] for v in values], 0.95, most)
    biases = np.array([v.bias for v in values])
    error = np.std([v.value - v.bias for v in values], ddof=1) / math.sqrt(draws)
    assert abs(np.mean([v.value for v in values]) - biases.mean() - distance) < 3 * error
    if kind is FrechetDistance:
        assert biases.mean() > 4 * error  # or the test would say nothing about bias
    assert all(v.method and v.n == n and len(v.blocks) == BLOCKS for v in values)


@pytest.mark.parametrize("n", [82, 130, 250], ids=["1.3 per feature", "2 per feature", "4 per feature"])
def test_the_interval_covers_where_images_are_few_and_the_plain_jackknife_does_not(n: int):
    dim, draws = 64, 60
    identity = torch.eye(dim, dtype=torch.float64)
    metric = FrechetDistance(reference_of(n, statistics=Statistics(torch.zeros(dim).double(), identity)))
    values = [measured(metric, normal(n, dim, seed=1000 + draw)) for draw in range(draws)]
    within([v.interval[0] <= 0 <= v.interval[1] for v in values], 0.95)
    plain = [limit(v.value, torch.tensor(v.blocks).double(), 9 * (np.mean(v.blocks) - v.value)) for v in values]
    if n < 200:
        assert np.mean([low <= 0 <= high for low, high in plain]) < 0.75


def test_no_interval_is_told_where_a_covariance_without_one_block_is_singular():
    dim = 64
    metric = FrechetDistance(reference_of(79, statistics=statistics_of(normal(500, dim, seed=1))))
    value = measured(metric, normal(79, dim, seed=2))
    assert value.bias is None and value.interval is None and value.stderr is not None
    assert "79 images are too few to tell the limit of a distance in 64 features: take 80" in value.note
    assert measured(metric, normal(80, dim, seed=2)).interval is not None


def test_the_interval_covers_the_score_of_infinitely_many_images():
    n, classes, draws = 500, 6, 200
    truth_metric = InceptionScore(reference_of(200_000, logits=classes), splits=1)
    truth = measured(truth_metric, normal(200_000, classes, seed=1), 1.5 * normal(200_000, classes, seed=1)).value
    metric = InceptionScore(reference_of(n, logits=classes))
    values = []
    for draw in range(draws):
        x = normal(n, classes, seed=1000 + draw)
        values.append(measured(metric, x, 1.5 * x))
    within([v.interval[0] <= truth <= v.interval[1] for v in values], 0.95)
    assert np.mean([v.bias for v in values]) < -0.01


@pytest.mark.parametrize("kind", [KernelDistance, ClipMMD])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kernel_distances_are_unbiased_and_their_intervals_cover(kind: type, shift: float):
    n, dim, draws = 60, 4, 200
    y = normal(300, dim, seed=1)
    settings = {"subsets": 20, "subset_size": 30} if kind is KernelDistance else {"normalize": False}
    large = kind(
        reference_of(4000, features=y), **({"subsets": 1, "subset_size": 4000} if "subsets" in settings else settings)
    )
    truth = measured(large, normal(4000, dim, seed=2) + shift)
    metric = kind(reference_of(n, features=y), **settings)
    values = [measured(metric, normal(n, dim, seed=1000 + draw) + shift) for draw in range(draws)]
    assert all(v.bias == 0 for v in values)
    within([v.interval[0] <= truth.value <= v.interval[1] for v in values], 0.95)
    spread = np.std([v.value for v in values], ddof=1)
    assert abs(np.mean([v.value for v in values]) - truth.value) < 3 * math.hypot(
        spread / math.sqrt(draws), truth.stderr
    )
    assert 0.8 < math.sqrt(np.mean(np.square([v.stderr for v in values]))) / spread < 1.7


@pytest.mark.parametrize("which", [0, 1], ids=["precision", "recall"])
def test_the_jackknife_of_precision_and_recall_is_of_the_size_of_their_spread(which: int):
    n, draws = 200, 60
    metric = PrecisionRecall(reference_of(n, features=normal(200, 3, seed=1)))
    values = []
    for draw in range(draws):
        metric.reset()
        metric.update(observation(0.8 * normal(n, 3, seed=100 + draw) + 0.8))
        values.append(metric.compute()[which])
    told = math.sqrt(np.mean(np.square([v.stderr for v in values])))
    ratio = told / np.std([v.value for v in values], ddof=1)
    print(ratio, values[0].value)
    assert 0.7 < ratio < 1.6
    assert values[0].bias is None and values[0].interval is None


# ----- paired effects


def arms(draw: int, n: int, dim: int, gap: float) -> tuple[Tensor, Tensor]:
    """Samples of two arms from the same noise; the second lies further off, and has a little noise of its own."""
    z, own = normal(n, dim, seed=1000 + draw), normal(n, dim, seed=5000 + draw)
    return 1.1 * z + 0.2, (1.1 + gap) * z + 0.2 + gap + 0.1 * own


@pytest.mark.parametrize("gap", [0.0, 0.1], ids=["almost equal", "different"])
def test_the_paired_interval_covers_the_difference_and_is_narrower(gap: float):
    n, dim, draws = 500, 8, 250
    zero, one = torch.zeros(dim).double(), torch.eye(dim).double()
    metric = FrechetDistance(reference_of(n, statistics=Statistics(zero, one)))
    first = dim * (0.2**2 + 0.1**2)
    second = dim * ((0.2 + gap) ** 2 + (math.hypot(1.1 + gap, 0.1) - 1) ** 2)
    effects, unpaired = [], []
    for draw in range(draws):
        a, b = (measured(metric, x) for x in arms(draw, n, dim, gap))
        effects.append(paired(a, b))
        unpaired.append(math.hypot(a.stderr, b.stderr))
    within([e.interval[0] <= first - second <= e.interval[1] for e in effects], 0.95, 0.985)
    assert np.mean([e.stderr for e in effects]) < 0.5 * np.mean(unpaired)
    if gap:
        assert np.mean([e.distinguishable for e in effects]) > 0.95
        assert paired(b, a).difference == pytest.approx(-effects[-1].difference)


def test_equal_arms_are_not_told_apart():
    n, dim, draws = 200, 4, 200
    metric = FrechetDistance(reference_of(n, statistics=statistics_of(normal(2000, dim, seed=1))))
    found = []
    for draw in range(draws):
        a, b = (measured(metric, 0.3 + normal(n, dim, seed=1000 * k + draw)) for k in (1, 2))
        found.append(paired(a, b).distinguishable)
    within([not f for f in found], 0.95)


def test_an_effect_is_read_at_a_glance():
    assert str(Effect(-0.31, 0.09, (-0.52, -0.10), 1000)) == "-0.31 [-0.52, -0.10]"
    assert str(Effect(-0.05, 0.09, (-0.21, 0.11), 1000)) == "-0.05 [-0.21, 0.11], not distinguishable at n = 1000"
    assert str(Effect(31.4, 9.0, (10.0, 52.8), 50)) == "31 [10, 53]"
    assert str(Effect(0.0, 0.0, (0.0, 0.0), 50)).startswith("0.00 [0.00, 0.00], not")


def test_values_that_cannot_be_paired_are_refused():
    blocks = tuple(float(i) for i in range(10))
    a = Value("fid", 3.0, 0.1, 100, "", blocks=blocks)
    assert paired(a, a).difference == 0
    with pytest.raises(DiffxError, match="different metrics"):
        paired(a, Value("is", 3.0, 0.1, 100, "", blocks=blocks))
    with pytest.raises(DiffxError, match="100 images here and 50 there"):
        paired(a, Value("fid", 3.0, 0.1, 50, "", blocks=blocks))
    with pytest.raises(DiffxError, match="no jackknife blocks"):
        paired(a, Value("fid", 3.0, None, 100, ""))
    with pytest.raises(DiffxError, match="undefined"):
        paired(a, Value("fid", math.nan, 0.1, 100, "", blocks=blocks))


def test_a_share_can_be_paired():
    n, classes = 400, 5
    labels = torch.arange(n) % classes
    good = torch.eye(classes, dtype=torch.float64)[labels]
    worse = good.clone()
    worse[torch.arange(0, n, 7)] = 0  # the first class for all of these
    metric, values = ClassConsistency(reference_of(n, num_classes=classes)), []
    for logits in (good, worse):
        metric.reset()
        metric.update(observation(logits, logits, labels))
        values += metric.compute()
    effect = paired(*values)
    assert effect.distinguishable and effect.difference == pytest.approx(1 - values[1].value)
