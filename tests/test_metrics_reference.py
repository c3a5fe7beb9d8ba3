"""What samples are compared with: statistics in files, features in the cache, and what is refused."""

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_support import Images, Pixels, make_images, normal, statistics_of

from diffx.metrics import FrechetDistance, ImageMetrics, Inapplicable, NoExtractor, Reference, Statistics
from diffx.metrics.accumulators import kept_of
from diffx.metrics.cache import Cache
from diffx.utils import DiffxError

torch.set_num_threads(1)


def reference(images: Images | None, folder: Path | None = None, **settings) -> Reference:
    extractor = settings.pop("extractor", None) or Pixels()
    return Reference(extractor, images, 20, batch_size=7, cache_dir=folder, **settings)


# ----- files of statistics


def test_statistics_survive_a_file(tmp_path: Path):
    whole = reference(Images(make_images(75, seed=1), fingerprint="mine"), tmp_path).statistics
    whole.save(tmp_path / "statistics.npz")
    read = Statistics.load(tmp_path / "statistics.npz")
    assert torch.equal(read.mean, whole.mean) and torch.equal(read.cov, whole.cov)
    assert (read.n, read.fingerprint, read.extractor, read.weights_hash) == (75, "mine", "pixels", "00")


def test_published_statistics_are_read_whatever_else_the_file_holds(tmp_path: Path):
    mu, sigma = np.arange(6, dtype=np.float32), 2 * np.eye(6, dtype=np.float32)
    layouts = {
        "adm": {"arr_0": np.zeros((9, 4, 4, 3), np.uint8), "mu_s": np.zeros(8), "sigma_s": np.eye(8)},
        "edm": {},
        "clean-fid": {"feats": np.zeros((9, 6), np.float32)},
    }
    for name, rest in layouts.items():
        np.savez(tmp_path / f"{name}.npz", **rest, mu=mu, sigma=sigma)
        published = Statistics.load(tmp_path / f"{name}.npz")
        assert published.n is None and published.cov.dtype == torch.float64
        assert published.mean.tolist() == mu.tolist() and published.cov.equal(2 * torch.eye(6).double())
        published.check(Pixels())
    with pytest.raises(DiffxError, match="6 features"):
        published.check(Pixels(dim=7))


def test_statistics_of_another_extractor_are_refused():
    found = reference(Images(make_images(9))).statistics
    with pytest.raises(DiffxError, match=r"'pixels'.*'other'"):
        found.check(Pixels(name="other"))
    with pytest.raises(DiffxError, match=r"'pixels'.*'other'"):
        reference(None, statistics=found, extractor=Pixels(name="other"))


def test_files_that_hold_no_statistics_are_refused(tmp_path: Path):
    path = tmp_path / "statistics.npz"
    with pytest.raises(DiffxError, match="no statistics at"):
        Statistics.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(DiffxError, match="mu and sigma"):
        Statistics.load(tmp_path / "array.npy")
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


# ----- ingredients


def test_statistics_do_not_depend_on_batches_and_features_are_found_on_the_way():
    images = Images(make_images(75, seed=1))
    features = Pixels()(images.images)[0]
    ours = reference(images, max_features=20)
    torch.testing.assert_close(ours.statistics.cov, torch.cov(features.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.statistics.mean, features.mean(dim=0), rtol=1e-12, atol=1e-12)
    read = images.read
    assert read == 75
    assert ours.features.equal(features[kept_of(75, 20)].float()) and ours.features is ours.features
    assert images.read == read
    # alone they need no pass over all images
    images.read = 0
    assert reference(images, max_features=20).features.equal(ours.features)
    assert images.read == 20


def test_statistics_of_each_class_are_those_of_its_images():
    images = Images(make_images(75, seed=1))
    found = reference(images, num_classes=5).class_statistics
    for c, statistics in enumerate(found):
        features = Pixels()(images.images[c::5])[0]
        torch.testing.assert_close(statistics.mean, features.mean(dim=0))
        torch.testing.assert_close(statistics.cov, torch.cov(features.T))
        assert statistics.n == 15


def test_statistics_in_a_file_spare_the_images():
    given, images = statistics_of(normal(50, 6, seed=1)), Images(make_images(30))
    both = reference(images, statistics=given)
    assert both.statistics is given and images.read == 0
    assert len(both.features) == 30
    only = reference(None, statistics=given, num_classes=5)
    for name in ("features", "class_statistics"):
        with pytest.raises(Inapplicable, match="file of statistics only"):
            getattr(only, name)


def test_ingredients_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch):
    images = Images(make_images(30))
    for name in ("statistics", "features", "class_statistics"):
        with pytest.raises(Inapplicable, match="extractor 'none' has no features"):
            getattr(reference(images, extractor=NoExtractor(), num_classes=5), name)
    with pytest.raises(Inapplicable, match="no classes"):
        _ = reference(images).class_statistics
    with pytest.raises(DiffxError, match="class 5: statistics need at least 2 images, not 0"):
        _ = reference(images, num_classes=6).class_statistics
    with pytest.raises(DiffxError, match="labels beyond its 4 classes"):
        _ = reference(images, num_classes=4).class_statistics
    with pytest.raises(Inapplicable, match="4096 features for 33 classes take 4 GiB and at most 4"):
        _ = reference(images, num_classes=33, extractor=Pixels(dim=4096)).class_statistics
    for few in (0, 1):
        with pytest.raises(DiffxError, match=f"at least 2 images, not {few}"):
            _ = reference(Images(make_images(few))).statistics
    with pytest.raises(DiffxError, match="metrics of 0 samples"):
        Reference(Pixels(), images, 0)
    monkeypatch.setattr(Pixels, "forward", lambda self, x: (torch.full((len(x), 6), torch.nan), x.flatten(1).float()))
    with pytest.raises(DiffxError, match="features of the reference under extractor 'pixels' are not finite"):
        _ = reference(images).statistics


def test_a_check_warns_of_too_few_images_and_refuses_mixed_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference(Images(make_images(30)), training=Images(make_images(9))).check()
    with pytest.warns(
        UserWarning, match=r"20 images and 15 reference images are too few for 24 features \(at least 25"
    ):
        reference(Images(make_images(15)), extractor=Pixels(dim=24)).check()
    with pytest.raises(DiffxError, match="reference 1x4x4, training 3x4x4"):
        reference(Images(make_images(15)), training=Images(make_images(9, 3))).check()

    class Choosy(Pixels):
        def check(self, channels: int, image_size: int) -> None:
            raise DiffxError(f"not {channels}x{image_size}")

    with pytest.raises(DiffxError, match="not 1x4"):
        reference(Images(make_images(15)), extractor=Choosy()).check()


# ----- the cache


def test_the_cache_is_used_and_keyed(tmp_path: Path):
    images = Images(make_images(60, seed=1), fingerprint="a")

    def compute(extractor=None, **settings) -> Reference:
        images.read = 0
        found = reference(images, tmp_path / "cache", extractor=extractor, num_classes=5, **settings)
        _ = found.statistics, found.features, found.class_statistics
        return found

    first = compute()
    assert images.read == 120
    again = compute()
    assert images.read == 0
    assert again.statistics.mean.equal(first.statistics.mean) and again.features.equal(first.features)
    assert [s.n for s in again.class_statistics] == [12] * 5
    assert again.class_statistics[3].cov.equal(first.class_statistics[3].cov)
    compute(Pixels(name="other"))
    assert images.read == 120
    compute(max_features=30)  # other features, the same statistics
    assert images.read == 30
    images.name = "b"
    compute()
    assert images.read == 120
    images.name = ""
    compute()
    assert images.read == 120 and len(list((tmp_path / "cache").iterdir())) == 3 * 3 + 1


@pytest.mark.parametrize("damage", ["truncated", "shorter", "empty", "nonsense", "stale", "other shape"])
def test_files_that_are_of_no_use_are_computed_anew_with_a_warning(damage: str, tmp_path: Path):
    images = Images(make_images(60, seed=1), fingerprint="a")
    expected = reference(images, tmp_path, num_classes=5)
    ingredients = ("statistics", "features", "class_statistics")
    _ = [getattr(expected, name) for name in ingredients]
    others = Images(make_images(60, seed=2), fingerprint="b")
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        new = {"truncated": content[:200], "shorter": content[:-40], "empty": b"", "nonsense": b"nothing of the kind"}
        if damage in new:
            path.write_bytes(new[damage])
            continue
        # the file of other images, or of other features, under this name
        extractor = Pixels() if damage == "stale" else Pixels(dim=7)
        stranger = reference(others, tmp_path / "other", num_classes=5, extractor=extractor)
        _ = [getattr(stranger, name) for name in ingredients]
        (other,) = (tmp_path / "other").glob(f"*-{path.name.split('-', 2)[2]}")
        path.write_bytes(other.read_bytes())
    found = reference(images, tmp_path, num_classes=5)
    with pytest.warns(UserWarning, match="anew") as told:
        _ = [getattr(found, name) for name in ingredients]
    assert sum("computing anew" in str(warning.message) for warning in told) == 3
    assert found.statistics.mean.equal(expected.statistics.mean) and found.features.equal(expected.features)
    images.read = 0
    again = reference(images, tmp_path, num_classes=5)
    assert again.class_statistics[1].mean.equal(expected.class_statistics[1].mean)
    assert again.features.equal(expected.features) and images.read == 0


def test_concurrent_jobs_leave_whole_files(tmp_path: Path):
    errors = []

    def job() -> None:
        try:
            for fingerprint in "abcde":
                found = reference(Images(make_images(60, seed=1), fingerprint=fingerprint), tmp_path)
                assert found.statistics.n == 60 and found.features.shape == (60, 6)
        except Exception as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a half-written file would cost a warning
        threads = [threading.Thread(target=job) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(list(tmp_path.iterdir())) == 10


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        found = reference(Images(make_images(9), fingerprint="a"), tmp_path / "file" / "cache").statistics
    assert found.n == 9


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache(Pixels(), "a").path("x.npz").parent == tmp_path / "diffx" / "statistics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache(Pixels(), "a").path("x.npz").parent == tmp_path / ".cache" / "diffx" / "statistics"


def test_two_metrics_share_what_was_computed():
    images = Images(make_images(60, seed=1))
    shared = reference(images)
    metrics = ImageMetrics(Pixels(), [FrechetDistance(shared), FrechetDistance(shared)])
    assert len(metrics.metrics) == 2 and images.read == 60
