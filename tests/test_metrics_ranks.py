"""The same values from any batches, in any order, on any number of ranks, and over any interruption."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from metrics_support import Images, Pixels, make_images
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffx.metrics import (
    ClassConsistency,
    ClipMMD,
    DensityCoverage,
    FrechetDistance,
    FrechetInfinity,
    ImageMetrics,
    InceptionScore,
    KernelDistance,
    NearestDistance,
    PerClassFrechet,
    PrecisionRecall,
    Reference,
    Value,
)
from diffx.metrics.accumulators import Reservoir, kept_of
from diffx.utils import Keys

torch.set_num_threads(1)

N = 97
IMAGES, TRAINING, HELDOUT = make_images(N, seed=1), make_images(120, seed=2, gamma=1.3), make_images(30, seed=3)
NAMES = 19  # precision and recall, density and coverage, nn_* and five classes among them


def metrics_of(folder: str | Path | None = None) -> ImageMetrics:
    pixels = Pixels()
    training = Images(TRAINING, fingerprint="training" if folder else "")
    reference = Reference(
        pixels,
        training,
        N,
        training=training,
        heldout=Images(HELDOUT),
        num_classes=5,
        batch_size=17,
        max_features=90,
        cache_dir=folder,
    )
    makers = (FrechetDistance, FrechetInfinity, InceptionScore, PerClassFrechet, ClassConsistency, NearestDistance)
    metrics = [make(reference) for make in makers]
    metrics += [make(reference, max_images=60) for make in (ClipMMD, PrecisionRecall, DensityCoverage)]
    return ImageMetrics(pixels, [*metrics, KernelDistance(reference, subsets=5, subset_size=30, max_images=60)])


def feed(metrics: ImageMetrics, batches: Iterator[Tensor] | list[Tensor]) -> ImageMetrics:
    for index in batches:
        metrics.update(IMAGES[index], index % 5, index)
    return metrics


@pytest.fixture(scope="module")
def whole() -> dict[str, Value]:
    return feed(metrics_of(), [torch.arange(N)]).compute()


def same(a: dict[str, Value], b: dict[str, Value]) -> None:
    assert list(a) == list(b) and len(a) == NAMES
    for name in a:
        assert a[name].n == b[name].n and a[name].value == a[name].value
        assert a[name].value == pytest.approx(b[name].value, rel=1e-9, abs=1e-12)
        for field, rel in (("blocks", 1e-9), ("stderr", 1e-6), ("bias", 1e-6), ("interval", 1e-6)):
            mine, theirs = (getattr(v[name], field) for v in (a, b))
            assert (mine is None) == (theirs is None), (name, field)
            assert mine is None or mine == pytest.approx(theirs, rel=rel, abs=1e-9), (name, field)


@pytest.mark.parametrize("size", [1, 13, 96])
def test_values_do_not_depend_on_batches_and_order(size: int, whole):
    order = Keys(size, torch.arange(N)).uniform("order").argsort()
    same(feed(metrics_of(), order.split(size)).compute(), whole)


def test_reset_forgets_all_images(whole):
    metrics = feed(metrics_of(), [torch.arange(N)])
    metrics.reset()
    assert all(not total.any() for total in metrics.state().values())
    same(feed(metrics, [torch.arange(N)]).compute(), whole)


def test_bounded_memory_whatever_the_number_of_images():
    def size(total: int) -> int:
        reference = Reference(Pixels(), Images(TRAINING), total, max_features=90)
        makers = (FrechetDistance, InceptionScore, FrechetInfinity)
        metrics = [*(make(reference) for make in makers), KernelDistance(reference, max_images=60)]
        return sum(total.nbytes for total in ImageMetrics(Pixels(), metrics).state().values())

    assert size(10_000) == size(100)


# ----- which features are kept


def test_kept_samples_follow_from_their_numbers_and_the_total():
    assert kept_of(50, 50).tolist() == list(range(50))
    kept = kept_of(1000, 100)
    assert len(set(kept.tolist())) == 100 and kept.equal(kept.sort().values) and kept.equal(kept_of(1000, 100))
    assert 300 < kept.double().mean() < 700
    # a larger share of the same samples
    assert set(kept.tolist()) < set(kept_of(1000, 200).tolist())


def test_a_reservoir_holds_its_samples_and_says_how_many():
    features = torch.arange(1000.0)[:, None].expand(-1, 3)
    reservoir = Reservoir(1000, 3, 100)
    for index in Keys(1, torch.arange(1000)).uniform("order").argsort().split(70):
        reservoir.update(features[index], index)
    held, index = reservoir.totals()
    assert index.equal(kept_of(1000, 100)) and held[:, 1].equal(index.float())
    assert (
        str(reservoir) == "100 of 1000 images, chosen by their sample numbers"
        and str(Reservoir(9, 3, 9)) == "all images"
    )


# ----- interruptions


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_an_interrupted_measurement_goes_on_bit_for_bit(stop: int, tmp_path: Path):
    batches = torch.arange(N).split(11)
    uninterrupted = feed(metrics_of(), batches)
    save_file(feed(metrics_of(), batches[:stop]).state(), tmp_path / "state.safetensors")
    resumed = metrics_of()
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    feed(resumed, batches[stop:])
    assert resumed.compute() == uninterrupted.compute()
    for name, total in resumed.state().items():
        assert total.equal(uninterrupted.state()[name]), name


def test_a_state_is_a_copy_and_one_of_other_metrics_is_refused():
    metrics = feed(metrics_of(), [torch.arange(50)])
    state = metrics.state()
    before = {name: total.clone() for name, total in state.items()}
    feed(metrics, [torch.arange(50, N)])
    assert all(state[name].equal(before[name]) for name in state)
    pixels = Pixels()
    reference = Reference(pixels, Images(TRAINING), N - 1)
    score = ImageMetrics(pixels, [InceptionScore(reference)])
    with pytest.raises(ValueError, match="other metrics"):
        score.load_state(state)
    kernel = ImageMetrics(pixels, [KernelDistance(reference)])
    other = ImageMetrics(pixels, [KernelDistance(Reference(pixels, Images(TRAINING), N))])
    kernel.update(IMAGES[:50], None, torch.arange(50))
    with pytest.raises(ValueError, match="another number of images"):
        other.load_state(kernel.state())
    assert not any(total.any() for total in other.state().values())


# ----- ranks


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=ranks)
    mine = torch.arange(N)[rank::ranks].split(10)
    metrics = feed(metrics_of(folder), mine[:2])
    state = metrics.state()
    # computing and saving leave the rank's own sums as they were
    values = [feed(metrics, mine[2:]).compute(), metrics.compute()]
    # one rank goes on with what both had seen
    metrics.reset()
    if rank == 0:
        metrics.load_state(state)
    values.append(feed(metrics, mine[2:]).compute())
    pairs = next(m for m in metrics.metrics if isinstance(m, NearestDistance)).closest()
    torch.save({"values": [[vars(v) for v in each.values()] for each in values], "pairs": pairs}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_values_of_one(tmp_path: Path, whole):
    # forked: a spawned process would spend ten seconds on imports
    processes = mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, join=False, start_method="fork")
    while not processes.join():
        pass
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert repr(ranks[0]["values"]) == repr(ranks[1]["values"])
    first, again, resumed = ({v["name"]: Value(**v) for v in values} for values in ranks[0]["values"])
    assert first == again
    same(first, whole)
    same(resumed, whole)
    nearest = next(m for m in feed(metrics_of(), [torch.arange(N)]).metrics if isinstance(m, NearestDistance))
    for mine, theirs in zip(ranks[0]["pairs"], nearest.closest(), strict=True):
        assert mine.equal(theirs)
    assert len(list(tmp_path.glob("pixels-*"))) == 3  # statistics, features, classes
