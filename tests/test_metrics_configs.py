"""Every choice of `extractor` and `metrics` builds, is named after its extractor, or says why it cannot be measured."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from metrics_support import Images, Pixels, inception_weights, make_images
from omegaconf import OmegaConf

from diffx.data import Digits
from diffx.metrics import (
    Classifier,
    Extractor,
    ImageMetric,
    ImageMetrics,
    Inapplicable,
    NoExtractor,
    Reference,
    Statistics,
)

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[1] / "configs"
METRICS = sorted(path.stem for path in (CONFIGS / "metrics").glob("*.yaml"))
NEEDS_DOWNLOADS = ("clip", "dinov2")  # built from stand-ins in test_metrics_extractors.py


def metric(name: str) -> partial:
    (made,) = instantiate(OmegaConf.load(CONFIGS / "metrics" / f"{name}.yaml")).values()
    return made


def test_all_metrics_are_there():
    names = "cmmd consistency dc fd fd_infinity is kid nearest per_class_fd pr"
    assert names.split() == METRICS


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_built_with_the_defaults_of_its_class(name: str):
    config = OmegaConf.load(CONFIGS / "metrics" / f"{name}.yaml")
    assert list(config) == [name] and config[name]._partial_
    images = Images(make_images(30))
    reference = Reference(Pixels(), images, 30, training=images, heldout=images, num_classes=5)
    plain, configured = metric(name).func(reference), metric(name)(reference)
    assert isinstance(configured, ImageMetric)
    index = torch.arange(30)
    for metrics in (both := [ImageMetrics(Pixels(), [m]) for m in (plain, configured)]):
        metrics.update(images.images, index % 5, index)
    first, second = (m.compute() for m in both)
    # NaN is not equal to itself
    assert repr(first) == repr(second) and all(v.method for v in first.values())
    assert all(
        "pixels" in v or v in ("class_consistency", "nn_distance", "nn_distance_heldout", "nn_ratio") for v in first
    )


STATISTICS_ONLY = {"kid", "pr", "dc", "cmmd", "per_class_fd"}


@pytest.mark.parametrize(
    ("reference", "left_out"),
    [
        (
            lambda images: Reference(NoExtractor(), images, 9, training=images, num_classes=5),
            set(METRICS) - {"nearest"},
        ),
        (lambda images: Reference(Pixels(classes=0), images, 9, num_classes=5), {"is", "consistency", "nearest"}),
        (lambda images: Reference(Pixels(), images, 9), {"per_class_fd", "consistency", "nearest"}),
        (
            lambda images: Reference(
                Pixels(), None, 9, statistics=Statistics(torch.zeros(6), torch.eye(6)), num_classes=5
            ),
            STATISTICS_ONLY | {"nearest"},
        ),
        (
            lambda images: Reference(Pixels(), None, 9, num_classes=5),
            STATISTICS_ONLY | {"fd", "fd_infinity", "nearest"},
        ),
    ],
    ids=["no features", "no logits", "no labels", "statistics only", "no reference"],
)
def test_metrics_whose_ingredients_are_missing_say_so(reference, left_out: set[str]):
    found, made = {}, reference(Images(make_images(30)))
    for name in METRICS:
        try:
            metric(name)(made)
        except Inapplicable as reason:
            found[name] = str(reason)
    assert set(found) == left_out
    assert all(":" in reason and not reason.endswith(".") for reason in found.values())  # the mistake: the remedy


@pytest.mark.parametrize("path", sorted((CONFIGS / "extractor").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_an_extractor(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    Classifier("mine", 1, 8, 3).save(tmp_path / "mine.safetensors")
    config = OmegaConf.load(path)
    if path.stem in NEEDS_DOWNLOADS:
        with pytest.raises(Exception, match=r"missing.*extractor\.download=true"):
            instantiate(config)
        return
    if path.stem == "inception":
        config.update(weights=str(inception_weights()), check_hash=False)
    if path.stem == "classifier":
        config.weights = str(tmp_path / "mine.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = instantiate(config)
    assert isinstance(extractor, Extractor)
    assert set(extractor.protocol()) == {"extractor", "weights_hash", "weights_origin", "preprocessing"}


def test_metrics_of_digits_tell_digits_from_noise(tmp_path: Path):
    source = Digits(name="digits", channels=1, image_size=8, num_classes=10, batch_size=64, flip=False, num_workers=0)
    train, test = source.load("train"), source.load("test")
    classifier = Classifier.shipped("digits")
    reference = Reference(classifier, train, 360, training=train, heldout=test, num_classes=10, cache_dir=tmp_path)
    reference.check()
    values = []
    for images in (test.images, make_images(360, size=8)):
        metrics = ImageMetrics(classifier, [metric(name)(reference) for name in METRICS])
        metrics.update(images, test.labels, torch.arange(360))
        values.append(metrics.compute())
    real, noise = values
    assert all(value.value == value.value for value in (*real.values(), *noise.values()))
    for name in ("fd_digits", "fd_infinity_digits", "kd_digits", "cmmd_digits", "per_class_fd_digits"):
        assert 20 * abs(real[name].value) < noise[name].value
    for name in ("precision_digits", "recall_digits", "density_digits", "coverage_digits"):
        assert real[name].value > 0.6 > 4 * noise[name].value
    assert real["is_digits"].value > 8 > 2 * noise["is_digits"].value
    assert real["class_consistency"].value > 0.97 > 4 * noise["class_consistency"].value
    assert real["nn_ratio"].value == pytest.approx(1) and noise["nn_ratio"].value > 2
