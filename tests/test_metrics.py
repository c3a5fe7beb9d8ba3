"""Metrics: equal to torch-fidelity and to closed forms, exact under any split, honest about their uncertainty."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing as mp
import torch_fidelity
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffx.data import Digits
from diffx.metrics import (
    BLOCKS,
    ClassConsistency,
    Classifier,
    Extractor,
    FrechetDistance,
    ImageMetrics,
    Inception,
    InceptionScore,
    NearestDistance,
    NoExtractor,
    Observation,
    Statistics,
    accuracy,
    cached_statistics,
    extract,
    fit_classifier,
    frechet_distance,
    nearest_distance,
    reference_statistics,
    standard_metrics,
    statistics_path,
)
from diffx.metrics.values import block_of, jackknife
from diffx.utils import DiffxError, Keys

CONFIGS = Path(__file__).parents[1] / "configs" / "extractor"


class Pixels(Extractor):
    """Features are fixed mixtures of pixels, in float64: the same whatever the batch."""

    def __init__(self, pixels: int = 16, dim: int = 6, classes: int = 5, name: str = "pixels") -> None:
        super().__init__()
        self.name, self.fd_name, self.is_name = name, f"fd_{name}", f"is_{name}"
        self.dim, self.num_classes, self.preprocessing = dim, classes, "none"
        mix = Keys(7, torch.arange(pixels)).normal("mix", dim + classes, dtype=torch.float64)
        self.register_buffer("mix", mix)

    @property
    def weights_hash(self) -> str:
        return "00"

    @property
    def origin(self) -> str:
        return "made up"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.flatten(1).to(torch.float64) / 255
        # sums of products, not a matrix product, whose rounding depends on the batch
        y = (x[:, :, None] * self.mix).sum(dim=1)
        return y[:, : self.dim], 2 * y[:, self.dim :]

    def check(self, channels: int, image_size: int) -> None: ...


def make_images(n: int, channels: int = 1, size: int = 4, seed: int = 0, gamma: float = 1.0) -> Tensor:
    u = Keys(seed, torch.arange(n)).uniform("images", channels, size, size)
    return (u**gamma * 255).to(torch.uint8)


def observation(features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None, start: int = 0):
    n = len(features)
    logits = features.new_zeros(n, 1) if logits is None else logits
    images, index = torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(start, start + n)
    return Observation(images, labels, index, features, logits)


def statistics_of(features: Tensor) -> Statistics:
    return Statistics(features.mean(dim=0), torch.cov(features.T), len(features))


def normal(n: int, dim: int, seed: int) -> Tensor:
    return Keys(seed, torch.arange(n)).normal("features", dim, dtype=torch.float64)


# ----- Fréchet distance


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


def test_frechet_distance_with_numbers_that_are_not_finite_is_nan():
    good = statistics_of(normal(20, 3, seed=1))
    bad = Statistics(good.mean * math.nan, good.cov * math.nan, 20)
    assert math.isnan(frechet_distance(bad, good))
    assert math.isnan(frechet_distance(good, bad))
    metric = FrechetDistance("fd", good)
    metric.update(observation(torch.full((20, 3), math.nan)))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.stderr is None and "not finite" in value.note


def test_too_few_images_are_noted_and_still_give_a_value():
    metric = FrechetDistance("fd", statistics_of(normal(100, 12, seed=1)))
    metric.update(observation(normal(9, 12, seed=2)))
    (value,) = metric.compute()
    assert value.value > 0 and value.n == 9 and "9 images are too few for 12 features" in value.note
    metric.reset()
    metric.update(observation(normal(50, 12, seed=2)))
    (value,) = metric.compute()
    assert value.n == 50 and value.note == ""
    metric.reset()
    metric.update(observation(normal(1, 12, seed=2)))
    (value,) = metric.compute()
    assert math.isnan(value.value) and "at least 2" in value.note


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from the reference"])
def test_moments_are_those_of_all_features_at_once(offset: float):
    features = normal(90, 5, seed=3) + offset
    reference = statistics_of(normal(60, 5, seed=4) + offset)
    metric = FrechetDistance("fd", reference)
    metric.update(observation(features[:31]))
    metric.update(observation(features[31:], start=31))
    (value,) = metric.compute()
    assert value.value == pytest.approx(frechet_distance(statistics_of(features), reference), rel=1e-7)


# ----- uncertainty


def test_jackknife_of_a_mean_is_the_standard_error_of_the_mean():
    x = normal(10, 1, seed=5)[:, 0]
    without = (x.sum() - x) / 9
    assert jackknife(without) == pytest.approx((x.std() / math.sqrt(10)).item(), rel=1e-12)
    assert jackknife(without[:1]) is None
    assert jackknife(torch.tensor([1.0, math.nan])) is None


@pytest.mark.parametrize(
    ("make", "shift", "least", "most"),
    [("frechet", 0.3, 0.8, 1.25), ("score", 0.8, 0.8, 1.25), ("frechet", 0.0, 1.0, 2.0), ("score", 0.0, 1.0, 2.0)],
    ids=["distance", "score", "distance near its minimum", "score near its maximum"],
)
def test_jackknife_matches_the_spread_over_repeated_draws(make: str, shift: float, least: float, most: float):
    n, dim, draws = 300, 4, 150
    reference = statistics_of(normal(5000, dim, seed=1))
    scale = 1 + shift
    values, errors = [], []
    for draw in range(draws):
        x = normal(n, dim, seed=100 + draw) * scale + shift * torch.arange(dim)
        metric = FrechetDistance("fd", reference) if make == "frechet" else InceptionScore("is", dim, n)
        metric.update(observation(x, logits=6 * x))
        (value,) = metric.compute()
        assert value.stderr is not None
        values.append(value.value)
        errors.append(value.stderr)
    spread = np.std(values, ddof=1)
    told = math.sqrt(np.mean(np.square(errors)))
    assert least < told / spread < most


# ----- Inception Score


def test_score_of_certain_and_uncertain_classes_is_the_closed_form():
    classes, n = 5, 100
    certain = 200 * torch.eye(classes)[torch.arange(n) % classes]
    for logits, expected in ((certain, classes), (torch.zeros(n, classes), 1), (certain[:1].expand(n, -1), 1)):
        metric = InceptionScore("is", classes, n, splits=1)
        metric.update(observation(logits, logits=logits))
        (value,) = metric.compute()
        assert value.value == pytest.approx(expected, rel=1e-9)


def test_score_of_incomplete_or_broken_images_says_so():
    logits = normal(40, 5, seed=1)
    metric = InceptionScore("is", 5, 40)
    metric.update(observation(logits[:30], logits=logits[:30]))
    (value,) = metric.compute()
    assert value.n == 30 and "30 images instead of 40" in value.note
    metric.reset()
    metric.update(observation(logits, logits=logits * math.nan))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.stderr is None and "not finite" in value.note
    with pytest.raises(ValueError, match="sample 40 is not among the 40"):
        metric.update(observation(logits, logits=logits, start=1))


# ----- agreement with torch-fidelity


class FidelityImages(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


class FidelityPixels(FeatureExtractorBase):
    def __init__(self, name, features_list, **kwargs) -> None:
        super().__init__(name, features_list)
        self.pixels = Pixels(pixels=48)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "features", "isc": "logits"}[metric]

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        both = dict(zip(("features", "logits"), self.pixels(images), strict=True))
        return tuple(both[name] for name in self.features_list)


def fidelity(images: Tensor, reference: Tensor | None, **settings) -> dict[str, float]:
    """torch-fidelity's Inception Score of the images and, with a reference, their FID."""
    return torch_fidelity.calculate_metrics(
        input1=FidelityImages(images),
        input2=None if reference is None else FidelityImages(reference),
        fid=reference is not None,
        isc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        **settings,
    )


@pytest.mark.parametrize("shuffle_seed", [2020, 5, None])
@pytest.mark.parametrize("n", [64, 203], ids=["64 images", "uneven splits"])
def test_fid_and_is_formulas_equal_torch_fidelity(n: int, shuffle_seed: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "pixels", FidelityPixels)
    images, reference = make_images(n, 3, seed=1), make_images(150, 3, seed=2, gamma=1.4)
    pixels = Pixels(pixels=48)
    fd = FrechetDistance("fd", reference_statistics(reference.split(40), pixels))
    metrics = ImageMetrics(pixels, [fd, InceptionScore("is", 5, n, shuffle_seed=shuffle_seed)])
    for batch in torch.arange(n).split(30):
        metrics.update(images[batch], None, batch)
    values = metrics.compute()
    settings = {"samples_shuffle": shuffle_seed is not None, "rng_seed": shuffle_seed or 0}
    expected = fidelity(images, reference, feature_extractor="pixels", **settings)
    # torch-fidelity takes the mean in float32
    assert values["fd"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert values["is"].value == pytest.approx(expected["inception_score_mean"], rel=1e-9)


def varied_images(n: int, channels: int, size: int, seed: int) -> Tensor:
    gamma = torch.logspace(-0.7, 0.7, n)[:, None, None, None]
    return ((make_images(n, channels, size, seed) / 255) ** gamma * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in: the network of torch-fidelity with random weights, strong enough for varied features and logits."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(fidelity_inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        network = fidelity_inception.FeatureExtractorInceptionV3("stand-in", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        # logits that differ between images rather than between classes
        mean = network(varied_images(4, 3, 16, seed=9))[0].mean(dim=0)
        network.fc.weight -= torch.outer(network.fc.weight @ mean, mean) / mean.square().sum()
        network.fc.weight *= 100
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
def test_inception_features_and_score_equal_torch_fidelity(channels: int, size: int, inception_weights: Path):
    n = 4
    images = varied_images(n, channels, size, seed=1)
    inception = Inception(inception_weights)
    inception.check(channels, size)
    features, logits = extract(inception, images)
    theirs = fidelity_inception.FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], str(inception_weights))
    expected_features, expected_logits = theirs(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5 * expected_features.max().item())
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5 * expected_logits.max().item())
    metric = InceptionScore("is", 1008, n, splits=2)
    metric.update(observation(features, logits))
    settings = {"isc_splits": 2, "feature_extractor_weights_path": str(inception_weights)}
    score = fidelity(images, None, **settings)["inception_score_mean"]
    assert score > 1.05  # or the comparison would say nothing
    assert metric.compute()[0].value == pytest.approx(score, rel=1e-4)


def test_fid_and_is_equal_torch_fidelity(inception_weights: Path):
    n = 11
    images, reference = varied_images(n, 3, 32, seed=1), make_images(n, 3, 32, seed=2, gamma=1.5)
    inception = Inception(inception_weights)
    metrics = ImageMetrics(inception, standard_metrics(inception, n, reference_statistics([reference], inception), 10))
    metrics.update(images[:5], None, torch.arange(5))
    metrics.update(images[5:], None, torch.arange(5, n))
    values = metrics.compute()
    assert list(values) == ["fid", "is"]
    expected = fidelity(images, reference, feature_extractor_weights_path=str(inception_weights))
    assert values["fid"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert values["is"].value == pytest.approx(expected["inception_score_mean"], rel=1e-4)


# ----- any split, any rank


def metrics_of(
    images: Tensor, reference: Statistics, training: Tensor, heldout: Tensor, batches: Iterator[Tensor]
) -> ImageMetrics:
    pixels = Pixels()
    metrics = ImageMetrics(pixels, standard_metrics(pixels, len(images), reference, 5, training, heldout))
    for index in batches:
        metrics.update(images[index], index % 5, index)
    return metrics


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Statistics, Tensor, Tensor]:
    images, training = make_images(97, seed=1), make_images(120, seed=2, gamma=1.3)
    return images, reference_statistics(training.split(50), Pixels()), training, make_images(30, seed=3)


def same(a, b) -> None:
    assert a.keys() == b.keys() and len(a) == 6
    for name in a:
        assert a[name].value == pytest.approx(b[name].value, rel=1e-9)
        assert a[name].stderr == pytest.approx(b[name].stderr, rel=1e-7)
        assert a[name].n == b[name].n


@pytest.mark.parametrize("size", [1, 13, 96])
def test_values_do_not_depend_on_batches_and_order(size: int, scene):
    n = len(scene[0])
    whole = metrics_of(*scene, batches=iter([torch.arange(n)])).compute()
    order = Keys(size, torch.arange(n)).uniform("order").argsort()
    same(metrics_of(*scene, batches=iter(order.split(size))).compute(), whole)


def _rank(rank: int, ranks: int, folder: str, scene: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=ranks)
    images, _, training, heldout = scene
    reference = cached_statistics(lambda: training.split(17), Pixels(), "training", folder)
    mine = torch.arange(len(images))[rank::ranks]
    metrics = metrics_of(images, reference, training, heldout, iter(mine.split(10)))
    first = metrics.compute()
    # computing leaves the rank's own sums as they were
    again = metrics.compute()
    torch.save([(v.name, v.value, v.stderr, v.n) for v in (*first.values(), *again.values())], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_values_of_one(tmp_path: Path, scene):
    # forked: a spawned process would spend ten seconds on imports
    processes = mp.start_processes(_rank, (2, str(tmp_path), scene), nprocs=2, join=False, start_method="fork")
    while not processes.join():
        pass
    alone = metrics_of(*scene, batches=iter([torch.arange(97)])).compute()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][:6] == ranks[0][6:]
    for name, value, stderr, n in ranks[0]:
        assert value == pytest.approx(alone[name].value, rel=1e-9)
        assert stderr == pytest.approx(alone[name].stderr, rel=1e-7)
        assert n == alone[name].n
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_reset_forgets_all_images(scene):
    n = len(scene[0])
    metrics = metrics_of(*scene, batches=iter([torch.arange(n)]))
    before = metrics.compute()
    metrics.reset()
    metrics.update(scene[0], torch.arange(n) % 5, torch.arange(n))
    same(metrics.compute(), before)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 1000])
def test_every_block_holds_every_class_alike(classes):
    index = torch.arange(classes * 1000)
    table = torch.bincount(index % classes * BLOCKS + block_of(index), minlength=classes * BLOCKS)
    # classes are dealt out in turn: leaving a block out must not leave a class out
    assert table.min() >= 60
    assert table.max() <= 140


def test_blocks_follow_the_sample_number():
    features = normal(30, 3, seed=1)
    metric = FrechetDistance("fd", statistics_of(normal(60, 3, seed=2)))
    metric.update(observation(features))
    count, first, _ = metric.moments.totals()
    assert count.tolist() == [3] * BLOCKS
    expected = features[block_of(torch.arange(30)) == 4].sum(dim=0) - 3 * metric.moments.centre
    torch.testing.assert_close(first[4], expected)


# ----- class consistency, nearest training image


def test_class_consistency_counts_the_labels_asked_for():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    metric = ClassConsistency(4)
    metric.update(observation(logits, logits, labels=torch.tensor([0, 1, 2, 0, 4])))  # 4: no class
    (value,) = metric.compute()
    assert (value.value, value.n) == (0.75, 4)
    assert value.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    metric.reset()
    metric.update(observation(logits, logits, labels=torch.full((5,), 4)))
    (value,) = metric.compute()
    assert math.isnan(value.value) and value.note
    with pytest.raises(DiffxError, match="labels"):
        metric.update(observation(logits, logits))


@pytest.mark.parametrize("chunk", [2**24, 100], ids=["one chunk", "many chunks"])
def test_nearest_distance_is_the_smallest_difference(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffx.metrics.nearest._CHUNK", chunk)
    images, training = make_images(9, 3, seed=1), make_images(31, 3, seed=2)
    images[4] = training[17]
    differences = (images[:, None].double() - training[None].double()).flatten(2) / 127.5
    expected = differences.square().mean(dim=2).sqrt().amin(dim=1)
    torch.testing.assert_close(nearest_distance(images, training), expected)
    assert expected[4] == 0 and nearest_distance(images, training)[4] == 0


def test_copies_of_training_images_are_noticed():
    training, unseen = make_images(60, seed=1), make_images(40, seed=2)
    for images, low, high in ((training[:20], 0, 0), (make_images(40, seed=3), 0.8, 1.25)):
        metric = NearestDistance(training, unseen)
        metric.update(Observation(images, None, torch.arange(len(images)), torch.empty(0), torch.empty(0)))
        values = {value.name: value for value in metric.compute()}
        assert low <= values["nn_ratio"].value <= high
        d = nearest_distance(images, training)
        assert values["nn_distance"].value == pytest.approx(d.mean().item())
        assert values["nn_distance"].stderr == pytest.approx((d.std() / math.sqrt(len(d))).item(), abs=1e-12)


# ----- reference statistics


def test_statistics_do_not_depend_on_batches_and_survive_a_file(tmp_path: Path):
    images = make_images(75, seed=1)
    whole = reference_statistics([images], Pixels(), "mine")
    parts = reference_statistics(images.split(7), Pixels(), "mine")
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.cov, torch.cov(Pixels()(images)[0].T), rtol=1e-12, atol=1e-12)
    whole.save(tmp_path / "statistics.npz")
    read = Statistics.load(tmp_path / "statistics.npz")
    assert torch.equal(read.mean, whole.mean) and torch.equal(read.cov, whole.cov)
    assert (read.n, read.fingerprint, read.extractor, read.weights_hash) == (75, "mine", "pixels", "00")


def test_published_statistics_are_read_and_compared(tmp_path: Path):
    np.savez(tmp_path / "published.npz", mu=np.zeros(6, np.float32), sigma=np.eye(6, dtype=np.float32))
    published = Statistics.load(tmp_path / "published.npz")
    assert published.n is None and published.cov.dtype == torch.float64
    published.check(Pixels())
    with pytest.raises(DiffxError, match="6 features"):
        published.check(Pixels(dim=7))
    with pytest.raises(DiffxError, match=r"'pixels'.*'other'"):
        reference_statistics([make_images(5)], Pixels()).check(Pixels(name="other"))


def test_files_that_hold_no_statistics_are_refused(tmp_path: Path):
    path = tmp_path / "statistics.npz"
    with pytest.raises(DiffxError, match="no statistics at"):
        Statistics.load(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(DiffxError, match="mu and sigma"):
        Statistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(DiffxError, match="shape"):
        Statistics.load(path)
    np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(DiffxError, match="not finite"):
        Statistics.load(path)
    np.savez(path, mu=np.array([{}]), sigma=np.eye(1))
    with pytest.raises(DiffxError, match="damaged"):
        Statistics.load(path)
    with pytest.raises(DiffxError, match=r"\.npz"):
        statistics_of(normal(9, 2, seed=1)).save(tmp_path / "statistics.pt")
    with pytest.raises(DiffxError, match="at least 2 images"):
        reference_statistics([make_images(1)], Pixels())
    with pytest.raises(DiffxError, match="at least 2 images"):
        reference_statistics([], Pixels())


def test_the_cache_is_used_and_keyed_and_mended(tmp_path: Path):
    calls = []

    def images():
        calls.append(1)
        return make_images(20, seed=len(calls)).split(8)

    def cached(extractor: Extractor, fingerprint: str) -> Statistics:
        return cached_statistics(images, extractor, fingerprint, tmp_path / "cache")

    first = cached(Pixels(), "a")
    assert torch.equal(cached(Pixels(), "a").mean, first.mean) and len(calls) == 1
    cached(Pixels(), "b")
    cached(Pixels(name="other"), "a")
    assert len(calls) == 3
    path = statistics_path(Pixels(), "a", tmp_path / "cache")
    for damage in (path.read_bytes()[:200], path.read_bytes()[:-40], b"", b"nothing of the kind"):
        path.write_bytes(damage)
        before = len(calls)
        with pytest.warns(UserWarning, match="anew"):
            cached(Pixels(), "a")
        assert len(calls) == before + 1
        cached(Pixels(), "a")
        assert len(calls) == before + 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_images_without_a_fingerprint_are_not_cached(tmp_path: Path):
    with pytest.raises(ValueError, match="fingerprint"):
        cached_statistics(lambda: [make_images(9)], Pixels(), "", tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        statistics = cached_statistics(lambda: [make_images(9)], Pixels(), "a", tmp_path / "file" / "cache")
    assert statistics.n == 9


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert statistics_path(Pixels(), "a").parent == tmp_path / "diffx" / "statistics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert statistics_path(Pixels(), "a").parent == tmp_path / ".cache" / "diffx" / "statistics"


# ----- extractors


@pytest.fixture(scope="module")
def digits():
    source = Digits(name="digits", channels=1, image_size=8, num_classes=10, batch_size=64, flip=False, num_workers=0)
    return source.load("train"), source.load("test")


def test_the_shipped_digits_classifier_knows_the_held_out_digits(digits):
    classifier = Classifier.shipped("digits")
    measured = accuracy(classifier, digits[1].images, digits[1].labels)
    assert measured >= 0.97
    assert measured == pytest.approx(classifier.accuracy, abs=1 / 360)
    assert (classifier.name, classifier.num_classes, classifier.dim) == ("digits", 10, 64)


def test_metrics_of_digits_tell_digits_from_noise(digits):
    classifier = Classifier.shipped("digits")
    train, test = digits
    reference = reference_statistics(train.images.split(500), classifier, train.fingerprint())
    values = []
    for images in (test.images, make_images(360, size=8)):
        metrics = ImageMetrics(classifier, standard_metrics(classifier, 360, reference, 10, train.images, test.images))
        metrics.update(images, test.labels, torch.arange(360))
        values.append(metrics.compute())
    real, noise = values
    names = ["fd_digits", "is_digits", "class_consistency", "nn_distance", "nn_distance_heldout", "nn_ratio"]
    assert list(real) == names
    assert 100 * real["fd_digits"].value < noise["fd_digits"].value
    assert real["is_digits"].value > 8 > 2 * noise["is_digits"].value
    assert real["class_consistency"].value > 0.97 > 4 * noise["class_consistency"].value
    assert real["nn_ratio"].value == pytest.approx(1) and noise["nn_ratio"].value > 2


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 3
    images = make_images(n, size=12, seed=seed, gamma=3)
    for k in range(3):
        images[labels == k, :, 4 * k : 4 * k + 4] //= 4
    return images, labels


def test_a_classifier_is_fitted_alike_from_one_seed_and_survives_a_file(tmp_path: Path):
    train, test = blobs(60, seed=1), blobs(30, seed=2)

    def fit(seed: int) -> Classifier:
        return fit_classifier(*train, *test, name="blobs", seed=seed, epochs=20, batch_size=20, progress=False)

    state = torch.random.get_rng_state()
    classifier, again, other = fit(0), fit(0), fit(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier.weights_hash == again.weights_hash != other.weights_hash
    assert classifier.accuracy >= 0.97
    classifier.save(tmp_path / "blobs.safetensors")
    read = Classifier.load(tmp_path / "blobs.safetensors")
    assert read.weights_hash == classifier.weights_hash and read.protocol() == classifier.protocol()
    assert (read.fd_name, read.is_name, read.num_classes) == ("fd_blobs", "is_blobs", 3)
    for a, b in zip(extract(read, test[0]), extract(classifier, test[0]), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DiffxError, match="1x12x12 images, but the data are 3x12x12"):
        read.check(3, 12)


def test_a_weak_classifier_is_refused():
    images, labels = blobs(60, seed=1)
    with pytest.raises(DiffxError, match="held-out accuracy"):
        fit_classifier(images, labels, images, labels.roll(1), name="blobs", epochs=1, progress=False)
    with pytest.raises(DiffxError, match="labelled"):
        fit_classifier(images, labels[:3], images, labels, name="blobs", progress=False)
    with pytest.raises(DiffxError, match="two classes"):
        fit_classifier(images, 0 * labels, images, 0 * labels, name="blobs", progress=False)
    with pytest.raises(DiffxError, match="'inception'"):
        fit_classifier(images, labels, images, labels, name="inception", progress=False)


def test_files_that_hold_no_classifier_are_refused(tmp_path: Path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(DiffxError, match="no classifier at"):
        Classifier.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DiffxError, match="damaged"):
        Classifier.load(path)
    Classifier("a", 1, 8, 3).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DiffxError, match="damaged"):
        Classifier.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DiffxError, match="no classifier of this version"):
        Classifier.load(path)
    with pytest.raises(DiffxError, match="did you mean 'digits'"):
        Classifier.shipped("digit")


def test_missing_inception_weights_are_named_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloads"))
    with pytest.raises(DiffxError) as error:
        Inception()
    file, advice = "weights-inception-2015-12-05-6726825d.pth", "extractor.weights=PATH"
    assert file in str(error.value) and advice in str(error.value) and "release page on GitHub" in str(error.value)
    with pytest.raises(DiffxError, match=r"extractor\.weights"):
        Inception(tmp_path / "absent.pth")

    def fails(url: str, path: str, **kwargs) -> None:
        assert kwargs["hash_prefix"].startswith("6726825d") and url.endswith(Path(path).name)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(DiffxError, match="no network"):
        Inception(download=True)


def test_the_place_of_the_inception_weights_is_torch_fidelitys():
    from diffx.metrics.extractors import inception

    assert inception._URL == fidelity_inception.URL_INCEPTION_V3


def test_inception_weights_that_are_something_else_are_refused(tmp_path: Path, inception_weights: Path):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(DiffxError, match="another network"):
        Inception(path)
    torch.save(nn.Linear(1, 1), path)  # more than weights: would run code when unpickled
    with pytest.raises(DiffxError, match="more than a file of weights"):
        Inception(path)
    inception = Inception(inception_weights)
    assert "non-standard" in inception.protocol()["weights_origin"]
    with pytest.raises(DiffxError, match="4 channels"):
        inception.check(4, 32)


def test_metrics_are_left_out_where_their_ingredients_are_missing():
    reference = reference_statistics([make_images(30)], Pixels())
    assert [type(m) for m in standard_metrics(NoExtractor(), 30, reference, 10)] == []
    assert [type(m) for m in standard_metrics(Pixels(), 30)] == [InceptionScore]
    assert [type(m) for m in standard_metrics(Pixels(), 30, reference, 10)] == [FrechetDistance, InceptionScore]
    metrics = ImageMetrics(NoExtractor(), standard_metrics(NoExtractor(), 4, training=make_images(9)))
    metrics.update(make_images(4, seed=1), None, torch.arange(4))
    assert list(metrics.compute()) == ["nn_distance"]


def test_a_training_loop_in_bfloat16_does_not_change_the_features():
    classifier, images = Classifier.shipped("digits"), make_images(5, size=8)
    classifier.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = extract(classifier, images)
    assert features.dtype == logits.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, extract(Classifier.shipped("digits"), images)[0])
    with pytest.raises(TypeError, match="uint8"):
        extract(classifier, images.float())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_an_extractor(path: Path, tmp_path: Path, inception_weights: Path):
    from hydra.utils import instantiate

    Classifier("mine", 1, 8, 3).save(tmp_path / "mine.safetensors")
    needed = {"inception": inception_weights, "classifier": tmp_path / "mine.safetensors"}
    config = OmegaConf.load(path)
    if path.stem in needed:
        config.weights = str(needed[path.stem])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = instantiate(config)
    assert isinstance(extractor, Extractor)
    assert set(extractor.protocol()) == {"extractor", "weights_hash", "weights_origin", "preprocessing"}
