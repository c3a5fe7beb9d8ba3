"""On the same images the values are torch-fidelity's; on images that are not the same they are not."""

import io

import numpy as np
import pytest
import torch
import torch_fidelity
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from metrics_support import Images, Pixels, inception_weights, make_images, normal, varied_images
from PIL import Image
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffx.data import Digits
from diffx.metrics import (
    Classifier,
    FrechetDistance,
    ImageMetrics,
    Inception,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    Reference,
    Statistics,
    extract,
    frechet_distance,
)
from diffx.metrics.frechet import Gaussian
from diffx.utils import Keys

torch.set_num_threads(1)

N = 7  # Inception makes a handful of images per second


# ----- formulas at size


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
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        features, logits = self.pixels(images)
        both = {"features": features.float(), "logits": logits}
        return tuple(both[name] for name in self.features_list)


@pytest.mark.parametrize(("n", "shuffle_seed"), [(64, 2020), (203, 5), (203, None)])
def test_the_whole_of_torch_fidelity_gives_the_same_values(n: int, shuffle_seed: int | None, monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "pixels", FidelityPixels)
    images, others = make_images(n, 3, seed=1), make_images(150, 3, seed=2, gamma=1.4)
    pixels = Pixels(pixels=48)
    reference = Reference(pixels, Images(others), n, batch_size=40)
    seed, size = 2020 if shuffle_seed is None else shuffle_seed, min(50, n)
    metrics = ImageMetrics(
        pixels,
        [
            FrechetDistance(reference),
            InceptionScore(reference, shuffle_seed=shuffle_seed),
            KernelDistance(reference, subset_size=size, seed=seed),
            PrecisionRecall(reference),
        ],
    )
    for batch in torch.arange(n).split(30):
        metrics.update(images[batch], None, batch)
    values = metrics.compute()
    expected = torch_fidelity.calculate_metrics(
        input1=FidelityImages(images),
        input2=FidelityImages(others),
        feature_extractor="pixels",
        **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        samples_shuffle=shuffle_seed is not None,
        rng_seed=seed,
        kid_subset_size=size,
        save_cpu_ram=True,
    )
    assert values["is_pixels"].value == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    # torch-fidelity computes the others in float32
    assert values["fd_pixels"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert values["kd_pixels"].value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert values["precision_pixels"].value == pytest.approx(expected["precision"])
    assert values["recall_pixels"].value == pytest.approx(expected["recall"])
    assert 0.1 < values["precision_pixels"].value < 1 and 0.1 < values["recall_pixels"].value < 1


def test_kernel_distance_at_full_size_equals_torch_fidelity():
    features, others = normal(1300, 16, seed=1).float(), 1.1 * normal(1100, 16, seed=2).float() + 0.1
    pixels = Pixels(dim=16)
    reference = Reference(pixels, None, 1300, statistics=Statistics(torch.zeros(16), torch.eye(16)))
    reference.features = others
    metric = KernelDistance(reference, subsets=10)
    metric.kept.update(features, torch.arange(1300))
    (value,) = metric.compute()
    expected = metric_kid.kid_features_to_metric(features, others, verbose=False, kid_subsets=10)
    assert value.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert value.note == "" and "10 subsets of 1000" in value.method


# ----- images


@pytest.fixture(scope="module")
def networks():
    theirs = fidelity_inception.FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], str(inception_weights()))
    return Inception(inception_weights(), check_hash=False), theirs


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
def test_inception_metrics_equal_torch_fidelity(channels: int, size: int, networks):
    images, others = varied_images(N, channels, size, seed=1), make_images(N, channels, size, seed=2, gamma=1.5)
    inception, theirs = networks
    reference = Reference(inception, Images(others), N)
    metrics = ImageMetrics(
        inception,
        [
            FrechetDistance(reference),
            InceptionScore(reference, splits=2),
            KernelDistance(reference, subset_size=6, subsets=10),
            PrecisionRecall(reference),
        ],
    )
    for index in torch.arange(N).split(5):
        metrics.update(images[index], None, index)
    values = {name.replace("_inception_other", ""): v.value for name, v in metrics.compute().items()}
    mine, logits = theirs(images.expand(-1, 3, -1, -1))
    yours, _ = theirs(others.expand(-1, 3, -1, -1))
    torch.testing.assert_close(reference.features, yours, rtol=1e-4, atol=1e-5 * yours.max().item())
    # its eigenvalues take ten seconds; the distance is the same in the space that the images span
    span = torch.linalg.qr(torch.cat([mine, yours]).double().T)[0]
    statistics = [metric_fid.fid_features_to_statistics(x.double() @ span) for x in (mine, yours)]
    expected = {
        **metric_fid.fid_statistics_to_metric(*statistics, verbose=False),
        **metric_isc.isc_features_to_metric(logits, splits=2),
        **metric_kid.kid_features_to_metric(mine, yours, verbose=False, kid_subset_size=6, kid_subsets=10),
        **metric_prc.prc_features_to_metric(mine, yours, verbose=False),
    }
    assert values["fd"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert values["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert values["kd"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert values["precision"] == pytest.approx(expected["precision"]) and values["recall"] == pytest.approx(
        expected["recall"]
    )
    assert values["is"] > 1.05  # or the comparison would say nothing


# ----- what is not the same image is not the same number


def statistics_of(features: Tensor) -> Statistics:
    return Statistics(features.double().mean(dim=0), torch.cov(features.double().T), len(features))


def test_resizing_and_compressing_move_the_distance(networks):
    inception, _ = networks
    images = varied_images(N, 3, 32, seed=1)
    reference = Gaussian(statistics_of(extract(inception, varied_images(N, 3, 32, seed=2))[0]))

    def distance_of(some: Tensor) -> float:
        found = statistics_of(extract(inception, some)[0])
        return reference.distance(N, found.mean, found.cov)

    straight = distance_of(images)
    smooth = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True)
    compressed = torch.stack([jpeg(image, quality=75) for image in images])
    assert abs(distance_of(smooth.round().to(torch.uint8)) / straight - 1) > 0.002
    assert abs(distance_of(compressed) / straight - 1) > 1


def jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def test_images_that_are_not_rounded_to_uint8_move_the_distance():
    classifier, source = (
        Classifier.shipped("digits"),
        Digits(name="digits", channels=1, image_size=8, num_classes=10, batch_size=64, flip=False, num_workers=0),
    )
    train, test = source.load("train").images, source.load("test").images
    # what a model puts out: values between the grey levels, and beyond black and white
    raw = test.float() + 40 * Keys(0, torch.arange(len(test))).normal("noise", 1, 8, 8)
    reference = statistics_of(extract(classifier, train)[0])

    def distance_of(features: Tensor) -> float:
        return frechet_distance(statistics_of(features), reference)

    straight = distance_of(extract(classifier, raw.round().clamp(0, 255).to(torch.uint8))[0])
    truncated = distance_of(extract(classifier, raw.clamp(0, 255).to(torch.uint8))[0])
    with torch.no_grad():
        as_they_are = distance_of(classifier.trunk(raw / 127.5 - 1))
    assert abs(truncated / straight - 1) > 0.005
    assert abs(as_they_are / straight - 1) > 0.2
