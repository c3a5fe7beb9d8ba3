"""Metrics on kept features and on pixels: KID, CMMD, precision and recall, density and coverage, copies, classes."""

import math

import pytest
import torch
from metrics_support import Images, Pixels, make_images, normal, observation, reference_of
from torch import Tensor

from diffx.metrics import (
    BLOCKS,
    ClassConsistency,
    ClipMMD,
    DensityCoverage,
    ImageMetrics,
    Inapplicable,
    KernelDistance,
    NearestDistance,
    Observation,
    PrecisionRecall,
    Reference,
)
from diffx.metrics.kernel import Gauss, Polynomial, mmd2
from diffx.metrics.nearest import nearest
from diffx.metrics.values import block_of
from diffx.utils import DiffxError

torch.set_num_threads(1)


def plain_mmd2(x: Tensor, y: Tensor, k) -> float:
    """By the definition, pair by pair."""

    def within(z: Tensor) -> float:
        return sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("chunk", [2**23, 40], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("kind", ["polynomial", "gauss"])
def test_the_discrepancy_is_its_definition_and_so_it_is_without_a_block(kind: str, chunk: int, monkeypatch):
    monkeypatch.setattr("diffx.metrics.kernel._CHUNK", chunk)
    x, y, block = normal(14, 3, seed=1), normal(11, 3, seed=2) + 0.5, torch.arange(14) % 3
    kernel, plain = {
        "polynomial": (Polynomial(3), lambda a, b: (a @ b / 3 + 1).item() ** 3),
        "gauss": (Gauss(0.8), lambda a, b: math.exp(-(a - b).square().sum().item() / (2 * 0.64))),
    }[kind]
    value, without = mmd2(x, y, block, 3, kernel)
    assert value.item() == pytest.approx(plain_mmd2(x, y, plain), rel=1e-10)
    for g in range(3):
        assert without[g].item() == pytest.approx(plain_mmd2(x[block != g], y, plain), rel=1e-10)


def test_subsets_of_all_images_are_the_whole_discrepancy():
    x, y = normal(30, 3, seed=1).float(), normal(30, 3, seed=2).float()
    metric = KernelDistance(reference_of(30, features=y))
    metric.update(observation(x))
    (value,) = metric.compute()
    expected, without = mmd2(x.double(), y.double(), block_of(torch.arange(30)), 10, Polynomial(3))
    assert value.value == pytest.approx(expected.item(), rel=1e-9)
    assert value.blocks == pytest.approx(without.tolist(), rel=1e-9)
    assert "subsets of 30 images instead of 1000" in value.note and value.n == 30 and value.name == "kd_pixels"


def test_cmmd_scales_normalizes_and_is_named_after_the_extractor():
    x, y = 3 * normal(40, 4, seed=1).float(), normal(30, 4, seed=2).float() + 1
    metric = ClipMMD(reference_of(40, features=y))
    metric.update(observation(x))
    (value,) = metric.compute()
    unit = [torch.nn.functional.normalize(z.double(), dim=1) for z in (x, y)]
    expected = 1000 * mmd2(*unit, block_of(torch.arange(40)), 10, Gauss(10.0))[0]
    assert value.value == pytest.approx(expected.item(), rel=1e-9) and value.value > 1
    assert value.name == "cmmd_pixels" and value.bias == 0 and "unbiased" in value.method


def inside(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Which of the points lie in the ball of which centre, by plain distances."""
    reach = (centres[:, None] - centres[None]).norm(dim=2).sort(dim=1).values[:, k]
    return (points[:, None] - centres[None]).norm(dim=2) <= reach


@pytest.mark.parametrize("chunk", [2**23, 100], ids=["one chunk", "many chunks"])
def test_balls_are_what_the_papers_say_and_so_they_are_without_a_block(chunk: int, monkeypatch):
    monkeypatch.setattr("diffx.metrics.manifolds._CHUNK", chunk)
    x, y = 1.1 * normal(50, 3, seed=1) + 1.2, normal(40, 3, seed=2)
    x, y = x.float().double(), y.float().double()
    reference, block = reference_of(50, features=y), block_of(torch.arange(50))
    pr, dc = PrecisionRecall(reference), DensityCoverage(reference)
    for metric in (pr, dc):
        metric.update(observation(x))
    values = {v.name: v for metric in (pr, dc) for v in metric.compute()}
    assert list(values) == ["precision_pixels", "recall_pixels", "density_pixels", "coverage_pixels"]
    for rows, read in [
        (torch.ones(50, dtype=torch.bool), lambda v: v.value),
        *((block != g, lambda v, g=g: v.blocks[g]) for g in range(BLOCKS)),
    ]:
        some = x[rows]
        expected = {
            "precision_pixels": inside(some, y, 3).any(dim=1).double().mean(),
            "recall_pixels": inside(y, some, 3).any(dim=1).double().mean(),
            "density_pixels": inside(some, y, 5).double().sum() / (5 * len(some)),
            "coverage_pixels": inside(some, y, 5).any(dim=0).double().mean(),
        }
        for name, value in expected.items():
            assert read(values[name]) == pytest.approx(value.item(), rel=1e-9), name
    assert 0.2 < values["precision_pixels"].value < 0.9 and 0.2 < values["coverage_pixels"].value < 0.99


def test_copies_of_the_data_lie_in_its_balls():
    y = normal(60, 3, seed=2)
    reference = reference_of(60, features=y)
    for kind, expected in ((PrecisionRecall, (1.0, 1.0)), (DensityCoverage, (1.2, 1.0))):
        metric = kind(reference)
        metric.update(observation(y))
        assert [v.value for v in metric.compute()] == pytest.approx(expected)  # of 5 neighbours and itself, by 5
        metric.reset()
        metric.update(observation(torch.zeros(60, 3)))  # constant images: nothing but one point is reached
        assert metric.compute()[1].value < 0.3


@pytest.mark.parametrize("kind", [KernelDistance, ClipMMD, PrecisionRecall, DensityCoverage])
def test_too_few_or_broken_features_give_no_number_but_the_reason(kind: type):
    metric = kind(reference_of(20, features=normal(20, 3, seed=1)))
    for features, note in (
        (normal(0, 3, seed=1), "images are needed"),
        (normal(1, 3, seed=1), "images are needed"),
        (normal(20, 3, seed=1) * math.nan, "not finite"),
    ):
        metric.reset()
        metric.update(observation(features))
        for value in metric.compute():
            assert math.isnan(value.value) and value.stderr is None and note in value.note
    with pytest.raises(ValueError, match="sample 20 is not among the 20"):
        metric.update(observation(normal(1, 3, seed=1), start=20))


# ----- class consistency


def test_class_consistency_counts_the_labels_asked_for():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    metric = ClassConsistency(reference_of(5, num_classes=4, logits=4))
    metric.update(observation(logits, logits, labels=torch.tensor([0, 1, 2, 0, 4])))  # 4: no class
    (value,) = metric.compute()
    assert (value.name, value.value, value.n, value.bias) == ("class_consistency", 0.75, 4, 0)
    assert value.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # one image in a block: that of a mean
    metric.reset()
    metric.update(observation(logits, logits, labels=torch.full((5,), 4)))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.note
    with pytest.raises(DiffxError, match="class_consistency needs the labels"):
        metric.update(observation(logits, logits))


# ----- nearest training image


@pytest.mark.parametrize("chunk", [2**24, 100], ids=["one chunk", "many chunks"])
def test_nearest_distance_is_the_smallest_difference(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffx.metrics.nearest._CHUNK", chunk)
    images, training = make_images(9, 3, seed=1), make_images(31, 3, seed=2)
    images[4] = training[17]
    differences = (images[:, None].double() - training[None].double()).flatten(2) / 127.5
    expected = differences.square().mean(dim=2).sqrt().min(dim=1)
    distance, where = nearest(images, training)
    torch.testing.assert_close(distance, expected.values)
    assert torch.equal(where, expected.indices)
    assert distance[4] == 0 and where[4] == 17


def near(training: Tensor, unseen: Tensor | None, total: int, **settings) -> NearestDistance:
    heldout = None if unseen is None else Images(unseen)
    return NearestDistance(Reference(Pixels(), None, total, training=Images(training), heldout=heldout), **settings)


def pixels(images: Tensor) -> Observation:
    return Observation(images, None, torch.arange(len(images)), torch.empty(0), torch.empty(0))


def test_copies_of_training_images_are_noticed():
    training, unseen = make_images(60, seed=1), make_images(40, seed=2)
    for images, low, high in ((training[:20], 0, 0), (make_images(40, seed=3), 0.8, 1.25)):
        metric = near(training, unseen, len(images))
        metric.update(pixels(images))
        values = {value.name: value for value in metric.compute()}
        assert low <= values["nn_ratio"].value <= high
        d = nearest(images, training)[0]
        assert values["nn_distance"].value == pytest.approx(d.mean().item())
        assert values["nn_distance"].stderr == pytest.approx((d.std() / math.sqrt(len(d))).item(), rel=0.6)
        assert values["nn_distance_heldout"].n == 40
    assert values["nn_ratio"].blocks == pytest.approx(
        [b / values["nn_distance_heldout"].value for b in values["nn_distance"].blocks]
    )


def test_the_closest_pairs_can_be_looked_at():
    training, images = make_images(60, seed=1), make_images(30, seed=3)
    images[11], images[23] = training[7], training[50]
    images[23, 0, 0, 0] ^= 1
    metric = near(training, None, 30, closest=3)
    assert [len(x) for x in metric.closest()] == [0, 0, 0]
    assert math.isnan(metric.compute()[0].value) and metric.compute()[0].note
    metric.update(pixels(images))
    assert [v.name for v in metric.compute()] == ["nn_distance"]
    samples, neighbours, distance = metric.closest()
    assert samples.tolist()[:2] == [11, 23] and neighbours.tolist()[:2] == [7, 50]
    assert distance[0] == 0 < distance[1] < distance[2] == nearest(images, training)[0].sort().values[2]


def test_training_images_are_held_once_and_not_without_limit(monkeypatch: pytest.MonkeyPatch):
    training = Images(make_images(60, seed=1))
    reference = Reference(Pixels(), None, 5, training=training)
    for _ in range(2):
        NearestDistance(reference)
    assert training.read == 61  # one of them to see the shape
    monkeypatch.setattr("diffx.metrics.reference._GIB", 200)
    with pytest.raises(Inapplicable, match="60 images of 1x4x4 take 5 GiB"):
        NearestDistance(Reference(Pixels(), None, 5, training=training))
    with pytest.raises(Inapplicable, match="no training images"):
        NearestDistance(Reference(Pixels(), None, 5))


def test_images_and_labels_that_are_none_are_refused():
    metrics = ImageMetrics(Pixels(), [ClassConsistency(reference_of(4, num_classes=5))])
    with pytest.raises(TypeError, match="uint8"):
        metrics.update(make_images(4).float(), None, torch.arange(4))
    with pytest.raises(DiffxError, match="labels"):
        metrics.update(make_images(4), None, torch.arange(4))
