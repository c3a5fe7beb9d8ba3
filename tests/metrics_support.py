"""What the tests of metrics share: a transparent extractor, made-up images and features, references."""

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from torch import Tensor, nn

from diffx.metrics import Extractor, Observation, Reference, Statistics
from diffx.utils import Keys


class Pixels(Extractor):
    """Features are fixed mixtures of pixels, in float64: the same whatever the batch."""

    def __init__(self, pixels: int = 16, dim: int = 6, classes: int = 5, name: str = "pixels") -> None:
        super().__init__()
        self.name, self.dim, self.num_classes, self.preprocessing = name, dim, classes, "none"
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


class Images:
    """An image set in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, fingerprint: str = "") -> None:
        self.images, self.name = images, fingerprint
        self.labels = torch.arange(len(images)) % 5 if labels is None else labels
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def get(self, indices: Tensor) -> dict[str, Tensor]:
        self.read += len(indices)
        return {"x": self.images[indices], "label": self.labels[indices]}

    def fingerprint(self) -> str:
        return self.name


def make_images(n: int, channels: int = 1, size: int = 4, seed: int = 0, gamma: float = 1.0) -> Tensor:
    u = Keys(seed, torch.arange(n)).uniform("images", channels, size, size)
    return (u**gamma * 255).to(torch.uint8)


def varied_images(n: int, channels: int, size: int, seed: int) -> Tensor:
    gamma = torch.logspace(-0.7, 0.7, n)[:, None, None, None]
    return ((make_images(n, channels, size, seed) / 255) ** gamma * 255).to(torch.uint8)


def normal(n: int, dim: int, seed: int) -> Tensor:
    return Keys(seed, torch.arange(n)).normal("features", dim, dtype=torch.float64)


def statistics_of(features: Tensor) -> Statistics:
    return Statistics(features.mean(dim=0), torch.cov(features.T), len(features))


def observation(features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None, start: int = 0):
    n = len(features)
    logits = features.new_zeros(n, 1) if logits is None else logits
    images, index = torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(start, start + n)
    return Observation(images, labels, index, features, logits)


def reference_of(
    total: int,
    *,
    statistics: Statistics | None = None,
    features: Tensor | None = None,
    by_class: list[Statistics] | None = None,
    num_classes: int = 0,
    logits: int = 5,
) -> Reference:
    """A reference with made-up ingredients."""
    known = statistics or (by_class[0] if by_class else None)
    dim = len(known.mean) if known else 6 if features is None else features.shape[1]
    reference = Reference(Pixels(dim=dim, classes=logits), None, total, statistics=statistics, num_classes=num_classes)
    # cached properties: what is set is not computed
    if features is not None:
        reference.features = features.to(torch.float32)
    if by_class is not None:
        reference.class_statistics = by_class
    return reference


@lru_cache
def inception_weights() -> Path:
    """A stand-in: the network of torch-fidelity with random weights, strong enough for varied features and logits."""
    path = Path(tempfile.mkdtemp(prefix="diffx-inception-")) / "weights.pth"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
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
