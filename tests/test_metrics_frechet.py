"""The Fréchet distance and the Inception Score: closed forms, independent implementations, and inputs that are odd."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from metrics_support import make_images, normal, observation, reference_of, statistics_of
from torchmetrics.image import FrechetInceptionDistance

from diffx.metrics import (
    BLOCKS,
    FrechetDistance,
    FrechetInfinity,
    InceptionScore,
    PerClassFrechet,
    Statistics,
    frechet_distance,
)
from diffx.utils import DiffxError

torch.set_num_threads(1)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    sigma_1, sigma_2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 2.0, 0.5]).double()
    mean_1, mean_2 = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([2.0, 1.0, 0.0]).double()
    rotation = torch.linalg.qr(normal(3, 3, seed=1))[0]
    a = Statistics(mean_1, rotation @ torch.diag(sigma_1**2) @ rotation.T)
    b = Statistics(mean_2, rotation @ torch.diag(sigma_2**2) @ rotation.T)
    expected = (mean_1 - mean_2).square().sum() + (sigma_1 - sigma_2).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("n", [200, 20], ids=["regular", "singular"])
def test_frechet_distance_agrees_with_sqrtm(n: int):
    dim = 24
    scale = torch.logspace(0, -2, dim, dtype=torch.float64)
    a = statistics_of(normal(n, dim, seed=1) * scale + 0.3)
    b = statistics_of(normal(n + 5, dim, seed=2) * scale.flip(0))
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy() + (n < dim) * 1e-14 * np.eye(dim))
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root.real)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("n", [200, 20], ids=["regular", "singular"])
def test_frechet_distance_to_itself_is_zero(n: int):
    a = statistics_of(normal(n, 24, seed=1))
    assert 0 <= frechet_distance(a, a) < 1e-7 * a.cov.trace().item()


def test_frechet_distance_agrees_with_torchmetrics():
    class Mixed(torch.nn.Module):
        num_features = 6

        def forward(self, images):
            return images.flatten(1).double() @ normal(16, 6, seed=3) / 255

    theirs, images = FrechetInceptionDistance(feature=Mixed()).set_dtype(torch.float64), make_images(90, seed=1)
    theirs.update(make_images(70, seed=2, gamma=1.4), real=True)
    theirs.update(images, real=False)
    reference = statistics_of(Mixed()(make_images(70, seed=2, gamma=1.4)))
    metric = FrechetDistance(reference_of(90, statistics=reference))
    metric.update(observation(Mixed()(images)))
    assert metric.compute()[0].value == pytest.approx(theirs.compute().item(), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from the reference"])
def test_moments_are_those_of_all_features_at_once(offset: float):
    features = normal(90, 5, seed=3) + offset
    reference = statistics_of(normal(60, 5, seed=4) + offset)
    metric = FrechetDistance(reference_of(90, statistics=reference))
    metric.update(observation(features[:31]))
    metric.update(observation(features[:0]))
    metric.update(observation(features[31:], start=31))
    (value,) = metric.compute()
    assert value.value == pytest.approx(frechet_distance(statistics_of(features), reference), rel=1e-7)


# ----- FID∞


def test_the_distance_at_infinity_is_on_the_line_through_the_distances_of_fewer_blocks():
    n, dim = 400, 12
    features, reference = normal(n, dim, seed=1), statistics_of(normal(3000, dim, seed=2))
    finite, infinite = (kind(reference_of(n, statistics=reference)) for kind in (FrechetDistance, FrechetInfinity))
    for metric in (finite, infinite):
        metric.update(observation(features))
    (at_n,), (limit,) = finite.compute(), infinite.compute()
    assert limit.name == "fd_infinity_pixels" and limit.value < 0.3 * at_n.value
    assert limit.value - limit.bias == pytest.approx(at_n.value - at_n.bias)
    assert abs(limit.bias) < 0.2 * at_n.bias
    assert limit.stderr == pytest.approx(at_n.stderr) and len(limit.blocks) == BLOCKS
    assert limit.interval[0] < limit.value < limit.interval[1]
    steeper = FrechetInfinity(reference_of(n, statistics=reference), least=8)
    steeper.update(observation(features))
    (other,) = steeper.compute()
    assert other.value != limit.value and other.interval == pytest.approx(limit.interval, rel=0.05)
    few = FrechetInfinity(reference_of(9, statistics=reference))
    few.update(observation(features[:9]))
    (value,) = few.compute()
    assert math.isnan(value.value) and "at least 20" in value.note
    with pytest.raises(ValueError, match="least"):
        FrechetInfinity(reference_of(9, statistics=reference), least=10)


# ----- class by class


def by_class(n: int, dim: int = 3) -> tuple[list[Statistics], torch.Tensor, torch.Tensor]:
    """Reference statistics of three classes, samples of them, the last far off, and their labels."""
    labels = torch.arange(n) % 3
    means = 4.0 * labels[:, None]
    statistics = [statistics_of(normal(500, dim, seed=20 + c) + 4.0 * c) for c in range(3)]
    return statistics, normal(n, dim, seed=1) + means + 2.0 * (labels == 2)[:, None], labels


def test_the_distance_of_each_class_is_that_of_its_images_and_the_worst_is_named():
    statistics, features, labels = by_class(300)
    metric = PerClassFrechet(reference_of(300, by_class=statistics, num_classes=3))
    for part in torch.arange(300).split(70):
        metric.update(observation(features[part], labels=labels[part], start=int(part[0])))
    mean, *each = metric.compute()
    assert [v.name for v in each] == ["fd_pixels_class_0", "fd_pixels_class_1", "fd_pixels_class_2"]
    for c, value in enumerate(each):
        expected = frechet_distance(statistics_of(features[labels == c]), statistics[c])
        assert value.value == pytest.approx(expected, rel=1e-9) and value.n == 100
        assert value.stderr is not None
    assert mean.name == "per_class_fd_pixels" and mean.n == 300
    assert mean.value == pytest.approx(sum(v.value for v in each) / 3)
    assert mean.note == f"worst class 2: {each[2].value:.4g}" and each[2].value > 10 * each[0].value
    assert 0 < mean.stderr < mean.value and len(mean.blocks) == BLOCKS


def test_classes_that_were_not_asked_for_and_missing_labels_are_told(monkeypatch: pytest.MonkeyPatch):
    statistics, features, labels = by_class(60)
    metric = PerClassFrechet(reference_of(60, by_class=statistics, num_classes=3))
    metric.update(observation(features, labels=torch.where(labels == 1, 3, labels)))  # 3: no class
    mean, *each = metric.compute()
    assert math.isnan(each[1].value) and "at least 2" in each[1].note
    assert "only 2 of 3 classes" in mean.note and mean.n == 40
    metric.reset()
    assert math.isnan(metric.compute()[0].value) and "no image was asked" in metric.compute()[0].note
    with pytest.raises(DiffxError, match="per_class_fd_pixels needs the labels"):
        metric.update(observation(features))
    monkeypatch.setattr("diffx.metrics.per_class._BYTES", 10)
    frugal = PerClassFrechet(reference_of(60, by_class=statistics, num_classes=3))
    frugal.update(observation(features, labels=labels))
    found = frugal.compute()
    assert all(v.stderr is None and "no standard error" in v.method for v in found)
    assert found[1].value == pytest.approx(frechet_distance(statistics_of(features[labels == 0]), statistics[0]))


# ----- Inception Score


def test_score_of_certain_and_uncertain_classes_is_the_closed_form():
    classes, n = 5, 100
    certain = 200 * torch.eye(classes)[torch.arange(n) % classes]
    for logits, expected in ((certain, classes), (torch.zeros(n, classes), 1), (certain[:1].expand(n, -1), 1)):
        metric = InceptionScore(reference_of(n), splits=1)
        metric.update(observation(logits, logits=logits))
        (value,) = metric.compute()
        assert value.value == pytest.approx(expected, rel=1e-9)


def test_score_of_incomplete_or_broken_images_says_so():
    logits = normal(40, 5, seed=1)
    metric = InceptionScore(reference_of(40))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.note == "undefined without images"
    metric.update(observation(logits[:30], logits=logits[:30]))
    (value,) = metric.compute()
    assert value.n == 30 and "30 images instead of 40" in value.note
    metric.reset()
    metric.update(observation(logits, logits=logits * math.nan))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.stderr is None and "not finite" in value.note
    with pytest.raises(ValueError, match="sample 40 is not among the 40"):
        metric.update(observation(logits, logits=logits, start=1))


# ----- odd input


def test_features_that_are_not_finite_give_no_number():
    good = statistics_of(normal(20, 3, seed=1))
    bad = Statistics(good.mean * math.nan, good.cov * math.nan, 20)
    assert math.isnan(frechet_distance(bad, good))
    assert math.isnan(frechet_distance(good, bad))
    for kind in (FrechetDistance, FrechetInfinity):
        metric = kind(reference_of(20, statistics=good))
        metric.update(observation(torch.full((20, 3), math.nan)))
        (value,) = metric.compute()
        assert math.isnan(value.value) and value.stderr is None and "not finite" in value.note


def test_too_few_images_are_told_with_how_many_are_needed():
    metric = FrechetDistance(reference_of(60, statistics=statistics_of(normal(100, 12, seed=1))))
    for n, note in (
        (0, "at least 2"),
        (1, "at least 2"),
        (9, "9 images are too few for 12 features (at least 13"),
        (60, ""),
    ):
        metric.reset()
        metric.update(observation(normal(n, 12, seed=2)))
        (value,) = metric.compute()
        assert value.n == n and math.isnan(value.value) == (n < 2)
        assert note in value.note and bool(note) == bool(value.note)
    few = FrechetDistance(reference_of(60, statistics=statistics_of(normal(7, 12, seed=1))))
    few.update(observation(normal(60, 12, seed=2)))
    assert "7 reference images are too few for 12 features" in few.compute()[0].note


def test_constant_images_are_called_a_collapse():
    reference = statistics_of(normal(100, 4, seed=1))
    metric = FrechetDistance(reference_of(50, statistics=reference))
    metric.update(observation(torch.full((50, 4), 0.7)))
    (value,) = metric.compute()
    expected = (reference.mean - 0.7).square().sum() + reference.cov.trace()
    assert value.value == pytest.approx(expected.item(), rel=1e-6)
    assert "all images have the same features" in value.note
