"""What an evaluation costs: extraction, the Fréchet distance, memory, and what remains beside the networks."""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from measure import Case, Clock, microseconds
from torch import Tensor, nn

from diffx.data import Digits
from diffx.metrics import Extractor, FrechetDistance, ImageMetrics, Inception, InceptionScore, Reference, Statistics
from diffx.metrics.frechet import frechet_distance

BATCH = 16
QUICK = 4
"""Images of a quick run, or of its evaluation sixteen times as many."""


def cases(quick: bool, clock: Clock) -> list[Case]:
    """Extraction per image, the distance per call, memory in MiB, and the parts of one evaluation per image."""
    return [_extraction(quick, clock), _distance(quick, clock), _memory(quick), _parts(quick)]


# ---- extraction ----


@cache
def stand_in() -> Path:
    """Inception's architecture with seeded random weights: as fast as the published ones, which are a download."""
    path = Path(tempfile.mkdtemp()) / "weights.pth"
    loading = (
        fidelity_inception.load_state_dict_from_url,
        fidelity_inception.FeatureExtractorInceptionV3.load_state_dict,
    )
    fidelity_inception.load_state_dict_from_url = lambda *args, **kwargs: {}
    fidelity_inception.FeatureExtractorInceptionV3.load_state_dict = lambda *args: None
    torch.manual_seed(0)
    network = fidelity_inception.FeatureExtractorInceptionV3("stand-in", ["2048"])
    fidelity_inception.load_state_dict_from_url = loading[0]
    fidelity_inception.FeatureExtractorInceptionV3.load_state_dict = loading[1]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def images_of(n: int, channels: int = 3, size: int = 32) -> Tensor:
    """Images of noise, uint8 `[n, C, H, W]`: what they show does not change the time."""
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _extraction(quick: bool, clock: Clock) -> Case:
    from torch_fidelity import calculate_metrics
    from torchmetrics.image.fid import NoTrainInceptionV3
    from torchmetrics.image.inception import InceptionScore as TorchmetricsScore

    n = QUICK if quick else 2 * BATCH
    images, weights = images_of(n), str(stand_in())
    inception = Inception(weights, check_hash=False)
    identity = Statistics(torch.zeros(2048, dtype=torch.float64), torch.eye(2048, dtype=torch.float64))
    reference = Reference(inception, None, n, statistics=identity)
    network = NoTrainInceptionV3("inception", ["logits_unbiased"], weights)
    torchmetrics_score = TorchmetricsScore(feature=network)

    class Plain(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return n

        def __getitem__(self, k: int) -> Tensor:
            return images[k]

    def fidelity() -> None:
        calculate_metrics(
            input1=Plain(),
            isc=True,
            isc_splits=2,
            batch_size=BATCH,
            cuda=False,
            verbose=False,
            cache=False,
            feature_extractor_weights_path=weights,
        )

    def torchmetrics() -> None:
        torchmetrics_score.reset()
        for batch in images.split(BATCH):
            torchmetrics_score.update(batch)

    def diffx() -> None:
        metrics = ImageMetrics(inception, [FrechetDistance(reference), InceptionScore(reference)])
        for index in torch.arange(n).split(BATCH):
            metrics.update(images[index], None, index)

    plain = fidelity_inception.FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"], weights)

    def network_alone() -> None:
        with torch.no_grad():
            for batch in images.split(BATCH):
                plain(batch)

    contenders = {
        # as its users run it: builds the network and loads the weights in every call
        "torch-fidelity, IS": microseconds(clock, fidelity, 1, n),
        "torch-fidelity's network alone": microseconds(clock, network_alone, 1, n),
        "torchmetrics, IS": microseconds(clock, torchmetrics, 1, n),
        "diffx, IS and FID": microseconds(clock, diffx, 1, n),
    }
    return Case("extraction by Inception, µs per image", f"{n} images [3, 32, 32]", contenders, 1 if quick else 3)


# ---- the distance ----


def _distance(quick: bool, clock: Clock) -> Case:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    dim = 64 if quick else 2048
    draw = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(3 * dim, dim, dtype=torch.float64, generator=draw)
        @ torch.randn(dim, dim, dtype=torch.float64, generator=draw)
        for _ in range(2)
    )
    a, b = (Statistics(x.mean(0), x.T.cov()) for x in (first, second))
    plain = [{"mu": s.mean.numpy(), "sigma": s.cov.numpy()} for s in (a, b)]

    def scipy() -> float:
        root = sqrtm(a.cov.numpy() @ b.cov.numpy())
        return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root).real)

    contenders: dict[str, Callable[[], float]] = {
        "scipy sqrtm": scipy,
        "torch-fidelity": lambda: fid_statistics_to_metric(*plain, False)["frechet_inception_distance"],
        "torchmetrics": lambda: _compute_fid(a.mean, a.cov, b.mean, b.cov).item(),
        "diffx": lambda: frechet_distance(a, b),
    }
    values = [contender() for contender in contenders.values()]
    assert np.allclose(values, values[0], rtol=1e-6), values
    timed = {name: _once(clock, contender) for name, contender in contenders.items()}
    return Case("Fréchet distance, µs per call", f"{dim} features", timed, 1 if quick else 3)


def _once(clock: Clock, function: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = clock()
        function()
        return (clock() - started) * 1e6

    return run


# ---- memory ----


class Projection(Extractor):
    """2048 random features at almost no cost, so that the memory of the metrics is what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.dim, self.num_classes, self.preprocessing = "projection", 2048, 10, "none"
        self.register_buffer("matrix", torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)))

    weights_hash = property(lambda self: "0" * 64)  # pyright: ignore[reportAssignmentType]
    origin = property(lambda self: "random")  # pyright: ignore[reportAssignmentType]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, 2048]` and logits `[B, 10]`."""
        features = images.flatten(1).float() @ self.matrix
        return features, features[:, :10] / 1e3

    def check(self, channels: int, image_size: int) -> None:
        """Takes all images."""


def peak_of(n: int) -> float:
    """MiB that this process has needed at most, after FID and IS of n images."""
    extractor = Projection()
    statistics = Statistics(torch.zeros(2048, dtype=torch.float64), torch.eye(2048, dtype=torch.float64))
    reference = Reference(extractor, None, n, statistics=statistics)
    metrics = ImageMetrics(extractor, [FrechetDistance(reference), InceptionScore(reference)])
    for index in torch.arange(n).split(250):
        metrics.update(images_of(len(index), 1, 8), None, index)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _memory(quick: bool) -> Case:
    def measured(n: int) -> Callable[[], float]:
        if quick:  # in this process: a new one would import everything
            return lambda: peak_of(n)
        command = [sys.executable, __file__, str(n)]
        return lambda: float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    counts = (250,) if quick else (1_000, 5_000, 20_000)
    contenders = {f"{n:,} images": measured(n) for n in counts}
    return Case("peak memory of FID and IS, MiB", "2048 features", contenders, 1)


# ---- the parts of an evaluation ----


def _parts(quick: bool) -> Case:
    from diffx.cli.build import build
    from diffx.cli.compose import Arguments
    from diffx.cli.train import config_of

    n = 16 * QUICK if quick else 1024
    arm = build(config_of(["trainer=cpu", "metrics=[fd,is,consistency]"], Arguments()))
    generator = arm.generator(arm.module.ema.denoiser.eval())
    assert isinstance(arm.source, Digits)
    arm.evaluator(generator, 64)  # reference statistics, and whatever else happens once
    measured: dict[str, float] = {}

    def total() -> float:
        started = time.perf_counter()
        measured.update(arm.evaluator(generator, n).seconds)
        return (time.perf_counter() - started) / n * 1e6

    def part(name: str) -> Callable[[], float]:
        return lambda: measured[name] / n * 1e6

    contenders = {"all": total, **{name: part(name) for name in ("sampling", "extraction", "rest")}}
    return Case("an evaluation, µs per image", f"unet_digits, NFE {generator.nfe}, {n} samples", contenders, 1)


if __name__ == "__main__":
    print(peak_of(int(sys.argv[1])))
