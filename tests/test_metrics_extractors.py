"""Extractors: what they take, what they are called, where their weights come from, and classifiers of one's own."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_clip as fidelity_clip
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from metrics_support import Pixels, inception_weights, make_images
from safetensors.torch import save_file
from torch import Tensor, nn

from diffx.data import Digits
from diffx.metrics import CLIP, Classifier, DINOv2, Inception, NoExtractor, accuracy, extract, fit_classifier
from diffx.metrics.extractors import inception as inception_module
from diffx.utils import DiffxError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloads"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *args, **kwargs: pytest.fail("asks the network"))


# ----- names


def test_metrics_are_called_after_their_extractor():
    assert Pixels().named("fd") == "fd_pixels" and NoExtractor().named("is") == "is_none"
    ours = object.__new__(Inception)
    ours.__dict__.update(name="inception", paper_names=inception_module._PAPER_NAMES)
    names = [ours.named(name) for name in ("fd", "fd_infinity", "is", "kd", "precision", "coverage", "cmmd")]
    assert names == ["fid", "fid_infinity", "is", "kid", "precision", "coverage", "cmmd_inception"]


# ----- Inception


def test_only_the_published_weights_may_be_called_fid(monkeypatch: pytest.MonkeyPatch):
    path = inception_weights()
    with pytest.raises(DiffxError, match=r"not the published file of Inception weights.*extractor\.check_hash=false"):
        Inception(path)
    other = Inception(path, check_hash=False)
    assert other.named("fd") == "fd_inception_other" and other.named("is") == "is_inception_other"
    assert "non-standard" in other.protocol()["weights_origin"]
    assert other.weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DiffxError, match="4 channels"):
        other.check(4, 32)
    monkeypatch.setattr(inception_module, "_SHA256", other.weights_hash)
    for check in (True, False):
        published = Inception(path, check_hash=check)
        assert published.named("fd") == "fid" and "published" in published.protocol()["weights_origin"]


def test_missing_inception_weights_are_named_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DiffxError) as error:
        Inception()
    file, advice = "weights-inception-2015-12-05-6726825d.pth", "extractor.weights=PATH"
    for part in (file, advice, "extractor.download=true", str(tmp_path / "torch"), "github.com/toshas"):
        assert part in str(error.value)
    with pytest.raises(DiffxError, match=r"extractor\.weights"):
        Inception(tmp_path / "absent.pth")

    def fails(url: str, path: str, **kwargs) -> None:
        assert kwargs["hash_prefix"].startswith("6726825d") and url.endswith(Path(path).name)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(DiffxError, match="no network"):
        Inception(download=True)


def test_the_place_of_the_inception_weights_is_torch_fidelitys():
    assert inception_module._URL == fidelity_inception.URL_INCEPTION_V3


def test_inception_weights_that_are_something_else_are_refused(tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(DiffxError, match="another network"):
        Inception(path, check_hash=False)
    torch.save(nn.Linear(1, 1), path)  # more than weights: would run code when unpickled
    with pytest.raises(DiffxError, match="more than a file of weights"):
        Inception(path, check_hash=False)


# ----- CLIP


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's architecture, small and with random weights, in the kind of file that OpenAI publishes."""

    class Archive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = fidelity_clip.CLIPVisual(24, 64, 2, 64, 32).visual
            self.text_projection = nn.Parameter(torch.zeros(5, 24))

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x) @ self.text_projection.T

    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        archive = Archive().eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(archive, torch.zeros(1, 3, 64, 64)).save(path)
    return path


def test_clip_is_torch_fidelitys(clip_weights: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DiffxError, match=r"not the published file of CLIP weights.*check_hash=false"):
        CLIP(weights=clip_weights)
    clip = CLIP(weights=clip_weights, check_hash=False)
    assert (clip.name, clip.dim, clip.num_classes) == ("clip_other", 24, 0) and "64x64" in clip.preprocessing
    images = make_images(5, 3, size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and OpenAI's files are of no other kind
        theirs = fidelity_clip.FeatureExtractorCLIP("clip-vit-b-32", ["clip"], str(clip_weights))
    features, logits = extract(clip, images)
    torch.testing.assert_close(features, theirs(images)[0], rtol=1e-4, atol=1e-5)
    assert features.std(dim=0).min() > 0 and logits.shape == (5, 0)
    grey = make_images(5, 1, size=16)
    assert extract(clip, grey)[0].equal(extract(clip, grey.repeat(1, 3, 1, 1))[0])
    clip.check(1, 8)
    with pytest.raises(DiffxError, match="4 channels"):
        clip.check(4, 8)
    found = {}
    for network in ("vit-b-32", "vit-l-14", "vit-l-14-336px"):
        monkeypatch.setitem(fidelity_clip.MODEL_METADATA[f"clip-{network}"], "hash", clip.weights_hash)
        clip_of = CLIP(network, weights=clip_weights)
        found[network] = (clip_of.named("fd"), clip_of.named("cmmd"))
    assert found == {
        "vit-b-32": ("fd_clip", "cmmd_clip"),
        "vit-l-14": ("fd_clip_vit_l_14", "cmmd_clip_vit_l_14"),
        "vit-l-14-336px": ("fd_clip_vit_l_14_336px", "cmmd"),
    }


def test_missing_or_other_clip_weights_are_named(tmp_path: Path):
    sha256 = fidelity_clip.MODEL_METADATA["clip-vit-l-14"]["hash"]
    with pytest.raises(DiffxError) as error:
        CLIP("vit-l-14")
    for part in (f"clip-vit-l-14-{sha256}.pt", "ViT-L-14.pt", "extractor.download=true", "extractor.weights=PATH"):
        assert part in str(error.value)
    with pytest.raises(DiffxError, match="did you mean 'vit-l-14'"):
        CLIP("vit-l-15")
    (tmp_path / "clip.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(DiffxError, match="damaged or no CLIP network"):
        CLIP(weights=tmp_path / "clip.pt", check_hash=False)


# ----- DINOv2

HUBCONF = """
import torch
def dinov2_vitl14(pretrained=True):
    torch.manual_seed(0)
    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_dim = 12
            self.patches = torch.nn.Conv2d(3, 12, 14, 14)
        def forward(self, x):
            assert x.shape[1:] == (3, 224, 224)
            return self.patches(x).square().mean(dim=(2, 3))
    return Stub()
"""


def test_dinov2_is_loaded_from_the_cache_through_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = tmp_path / "torch" / "hub"
    code, weights = hub / "facebookresearch_dinov2_main", hub / "checkpoints" / "dinov2_vitl14_pretrain.pth"
    for present in (None, code / "hubconf.py"):
        if present is not None:
            present.parent.mkdir(parents=True)
            present.write_text(HUBCONF)  # the code without the weights is not enough
        with pytest.raises(DiffxError) as error:
            DINOv2()
        for part in (str(code), str(weights), "github.com/facebookresearch/dinov2", "extractor.download=true"):
            assert part in str(error.value)
    weights.parent.mkdir()
    torch.save({"x": torch.zeros(1)}, weights)

    def offline(*args, **kwargs) -> None:
        raise torch.hub.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with torch.random.fork_rng():
        dinov2 = DINOv2()
    assert (dinov2.named("fd"), dinov2.dim, dinov2.num_classes) == ("fd_dinov2", 12, 0)
    assert dinov2.weights_hash == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "dgm-eval: bicubic" in dinov2.preprocessing
    features, logits = extract(dinov2, make_images(4, 1, size=8))
    assert features.shape == (4, 12) and logits.shape == (4, 0) and features.std(dim=0).min() > 0
    dinov2.check(3, 64)
    weights.write_bytes(b"damaged")
    with pytest.raises(DiffxError, match="cannot be loaded"):
        DINOv2()
    with pytest.raises(DiffxError, match="did you mean 'vit-l-14'"):
        DINOv2("vit-l-16")


# ----- classifiers


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
    # the weights that numbers in the documentation stand on, whatever is done for speed
    assert classifier.weights_hash.startswith("e31f6ed8169a843d")
    features, logits = extract(classifier, digits[1].images[:50])
    by_hand = Classifier.shipped("digits").to(memory_format=torch.contiguous_format)
    for mine, theirs in zip((features, logits), by_hand(digits[1].images[:50]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def blobs(n: int, seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 3
    images = make_images(n, size=size, seed=seed, gamma=3)
    third = size // 3
    for k in range(3):
        images[labels == k, :, third * k : third * (k + 1)] //= 4
    return images, labels


@pytest.mark.parametrize("size", [12, 28], ids=["small", "pooled early"])
def test_a_classifier_is_fitted_alike_from_one_seed_and_survives_a_file(size: int, tmp_path: Path):
    train, test = blobs(60, seed=1, size=size), blobs(30, seed=2, size=size)

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
    assert (read.named("fd"), read.named("is"), read.num_classes) == ("fd_blobs", "is_blobs", 3)
    for a, b in zip(extract(read, test[0]), extract(classifier, test[0]), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DiffxError, match=f"1x{size}x{size} images, but the data are 3x{size}x{size}"):
        read.check(3, size)


def test_large_sets_are_passed_fewer_times():
    steps = []

    class Counted(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            steps.append(1)
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Counted)
        patch.setattr("diffx.metrics.fit._IMAGES", 900)
        images, labels = blobs(90, seed=1)
        fit_classifier(images, labels, images, labels, name="blobs", batch_size=30, min_accuracy=0, progress=False)
    assert len(steps) == 10 * 3


def test_a_weak_classifier_is_refused():
    images, labels = blobs(60, seed=1)
    with pytest.raises(DiffxError, match="held-out accuracy"):
        fit_classifier(images, labels, images, labels.roll(1), name="blobs", epochs=1, progress=False)
    with pytest.raises(DiffxError, match="labelled"):
        fit_classifier(images, labels[:3], images, labels, name="blobs", progress=False)
    with pytest.raises(DiffxError, match="two classes"):
        fit_classifier(images, 0 * labels, images, 0 * labels, name="blobs", progress=False)
    for name in ("inception", "clip", "Blobs"):
        with pytest.raises(DiffxError, match=f"'{name}'"):
            fit_classifier(images, labels, images, labels, name=name, progress=False)


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
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DiffxError, match="no classifier of this version"):
        Classifier.load(path)
    with pytest.raises(DiffxError, match="did you mean 'digits'"):
        Classifier.shipped("digit")


def test_a_training_loop_in_bfloat16_does_not_change_the_features():
    classifier, images = Classifier.shipped("digits"), make_images(5, size=8)
    classifier.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = extract(classifier, images)
    assert features.dtype == logits.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, extract(Classifier.shipped("digits"), images)[0])
    with pytest.raises(TypeError, match="uint8"):
        extract(classifier, images.float())
