"""An evaluation gives the same numbers on any number of processes, in any batches, stopped and resumed or not."""

import datetime
import json
import math
import random
import signal
import warnings
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CONFIGS, build
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffx.autoencoders import Pixels
from diffx.conditioning import LabelConditioner
from diffx.data import Digits
from diffx.data.image_set import load_images
from diffx.denoisers import Preconditioned
from diffx.evaluation import Evaluation, Evaluator, Interrupted, in_batches
from diffx.generate import Generator
from diffx.metrics import Classifier, FrechetDistance, NoExtractor, Value
from diffx.pictures import write_png
from diffx.utils import DiffxError

torch.set_num_threads(1)

CLASSES, TOTAL = 10, 61


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@lru_cache
def digits():
    return Digits(name="digits", channels=1, image_size=8, num_classes=CLASSES, batch_size=8, flip=False, num_workers=0)


def metrics_of(*names):
    """The metrics that the YAML files describe; all of them by default."""
    nodes = OmegaConf.create({})
    for file in sorted((CONFIGS / "metrics").glob("*.yaml")):
        nodes.merge_with(OmegaConf.load(file))
    return {name: instantiate(nodes[name]) for name in names or nodes}


def evaluator_of(*names, **changes):
    settings = {"reference": "test", "batch_size": 7, "save_every": 10_000} | changes
    return Evaluator(Classifier.shipped("digits"), digits(), metrics_of(*names), **settings)


@lru_cache
def generator():
    """Two steps of a network with weights that do not start at 0."""
    torch.manual_seed(0)
    backbone = build("backbone", "unet_tiny", in_channels=1, image_size=8, num_classes=CLASSES)
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = Preconditioned(backbone, build("schedule", "edm"), build("parameterization", "edm")).eval()
    return Generator(
        denoiser,
        build("sampler", "ddim"),
        build("discretization", "karras"),
        2,
        Pixels(),
        LabelConditioner(CLASSES),
        (1, 8, 8),
        num_classes=CLASSES,
    )


@lru_cache
def uninterrupted():
    return evaluator_of()(generator(), TOTAL).values


def assert_identical(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        a, b = actual[name], value
        assert a == b or (math.isnan(a.value) and math.isnan(b.value)), name


def test_all_metrics_apply_to_labelled_data_with_features():
    measured = evaluator_of()(generator(), TOTAL)
    assert measured.omitted == {}
    assert {"fd_digits", "is_digits", "class_consistency", "precision_digits", "nn_ratio"} < set(measured.values)
    assert all(value.n for value in measured.values.values())
    assert set(measured.seconds) == {"sampling", "extraction", "rest"}


def test_what_does_not_apply_is_left_out_and_named():
    evaluator = Evaluator(NoExtractor(), digits(), metrics_of("fd", "consistency", "nearest"), batch_size=32)
    measured = evaluator(generator(), 10)
    assert set(measured.omitted) == {"fd", "consistency"} and all(measured.omitted.values())
    assert "nn_distance" in measured.values


def join(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=240),
    )


def evaluate_on(rank, world_size, folder):
    """What a process of the test below does."""
    join(rank, world_size, folder)
    values = evaluator_of()(generator(), TOTAL, "cpu", rank, world_size).values
    # the other processes have nothing to do
    few = evaluator_of("fd", "consistency", batch_size=2000)
    values |= few.baselines(rank, world_size)
    values["one"] = few(generator(), 1, "cpu", rank, world_size).values["class_consistency"]
    (folder / f"{rank}.json").write_text(json.dumps({name: vars(value) for name, value in values.items()}))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_values_do_not_depend_on_the_number_of_processes(tmp_path, world_size):
    few = evaluator_of("fd", "consistency", batch_size=2000)
    expected = uninterrupted() | few.baselines()
    expected["one"] = few(generator(), 1).values["class_consistency"]
    mp.spawn(evaluate_on, (world_size, tmp_path), nprocs=world_size)
    for rank in range(world_size):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(values) == list(expected)
        for name, value in expected.items():
            # a pixel rounded the other way, no more
            assert values[name]["value"] == pytest.approx(value.value, rel=1e-3, abs=1e-6, nan_ok=True), name
            assert values[name]["n"] == value.n


@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_values_do_not_depend_on_the_batches(batch_size):
    values = evaluator_of("fd", "is", "consistency", batch_size=batch_size)(generator(), TOTAL).values
    for name, value in values.items():
        assert value.value == pytest.approx(uninterrupted()[name].value, rel=1e-3), name


def stop_after(batches):
    left = [batches]

    def stop():
        left[0] -= 1
        return signal.SIGUSR2 if left[0] < 0 else 0

    return stop


@pytest.mark.parametrize("seed", range(3))
def test_stopped_at_random_batches_the_values_are_those_of_one_go(tmp_path, seed):
    rng, snapshot = random.Random(seed), tmp_path / "partial.safetensors"
    done = 0
    while True:
        try:
            stop = stop_after(rng.randrange(1, 4))
            measured = evaluator_of()(generator(), TOTAL, snapshot=snapshot, stop=stop)
        except Interrupted as interrupted:
            assert done < interrupted.done < TOTAL
            done = interrupted.done
        else:
            break
    assert done > 0
    assert_identical(measured.values, uninterrupted())


def resume_on(rank, world_size, folder):
    join(rank, world_size, folder)
    # only one of them is asked to stop, all do
    stop = stop_after(2 if rank == 1 else 1000)
    try:
        evaluator_of()(generator(), TOTAL, "cpu", rank, world_size, snapshot=folder / "s.safetensors", stop=stop)
    except Interrupted as interrupted:
        (folder / f"{rank}.txt").write_text(f"{interrupted.done} samples, {signal.Signals(interrupted.signal).name}")
    dist.destroy_process_group()


def test_stopped_on_two_processes_it_goes_on_with_one(tmp_path):
    mp.spawn(resume_on, (2, tmp_path), nprocs=2)
    assert {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)} == {"42 samples, SIGUSR2"}  # 3 rounds of 14
    told = []
    measured = evaluator_of()(generator(), TOTAL, snapshot=tmp_path / "s.safetensors", on_batch=told.append)
    assert told == [49, 56, 61]
    for name, value in uninterrupted().items():
        assert measured.values[name].value == pytest.approx(value.value, rel=1e-3, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_snapshot_is_told_and_the_evaluation_starts_anew(tmp_path, damage):
    snapshot = tmp_path / "s.safetensors"
    with pytest.raises(Interrupted):
        evaluator_of("fd")(generator(), TOTAL, snapshot=snapshot, stop=stop_after(2))
    if damage == "truncated":
        snapshot.write_bytes(snapshot.read_bytes()[:-100])
    else:  # of other metrics
        with pytest.raises(Interrupted), pytest.warns(UserWarning, match="starts anew"):
            evaluator_of("is")(generator(), TOTAL, snapshot=snapshot, stop=stop_after(5))
    with pytest.warns(UserWarning, match="starts anew"):
        values = evaluator_of("fd")(generator(), TOTAL, snapshot=snapshot).values
    assert values["fd_digits"] == uninterrupted()["fd_digits"]


def test_a_full_disk_costs_the_snapshot_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("diffx.evaluation.evaluator.save_file", partial(_no_space))
    with pytest.warns(UserWarning, match="goes on without a snapshot"):
        values = evaluator_of("fd", save_every=7)(generator(), 20, snapshot=tmp_path / "s.safetensors").values
    assert values["fd_digits"].n == 20 and list(tmp_path.iterdir()) == []


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_progress_is_told():
    told = []
    evaluator = Evaluator(NoExtractor(), digits(), {}, batch_size=4)
    evaluator(generator(), 10, on_batch=told.append)
    assert told == [4, 8, 10]


def test_baselines_frame_the_distance():
    evaluator = evaluator_of("fd", batch_size=128)
    baselines = evaluator.baselines()
    assert list(baselines) == ["fd_digits_floor", "fd_digits_noise"]
    floor, noise = (value.value for value in baselines.values())
    assert 0 < floor < noise / 10
    assert Evaluator(NoExtractor(), digits(), metrics_of("fd")).baselines() == {}


def test_the_protocol_says_what_the_values_stand_on():
    protocol = evaluator_of().protocol()
    assert protocol["extractor"] == "digits" and len(protocol["weights_hash"]) == 64
    assert protocol["reference"] == {
        "data": "digits",
        "split": "test",
        "images": 360,
        "fingerprint": digits().split("test").fingerprint(),
    }
    other = evaluator_of(reference="train").protocol()["reference"]
    assert other["fingerprint"] != protocol["reference"]["fingerprint"]


def test_a_file_of_statistics_is_as_good_a_reference_as_the_images(tmp_path):
    evaluator = evaluator_of("fd", "is", "pr")
    evaluator.references(TOTAL).statistics.save(tmp_path / "r.npz")
    from_file = evaluator_of("fd", "is", "pr", reference=str(tmp_path / "r.npz"))
    from_file.check()
    measured = from_file(generator(), TOTAL)
    assert measured.values["fd_digits"].value == evaluator(generator(), TOTAL).values["fd_digits"].value
    assert list(measured.omitted) == ["pr"]  # needs the reference images themselves
    assert from_file.protocol()["reference"]["file"] == "r.npz" and from_file.baselines() == {}


def test_statistics_of_another_extractor_are_refused(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DiffxError, match="2048"):
        evaluator_of("fd", reference=str(tmp_path / "fid.npz")).check()


def test_an_extractor_for_other_images_is_refused():
    source = Digits(name="larger", channels=3, image_size=32, num_classes=10, batch_size=8, flip=False, num_workers=0)
    with pytest.raises(DiffxError, match="3x32x32"):
        Evaluator(Classifier.shipped("digits"), source, metrics_of("fd")).check()


def test_an_evaluation_survives_its_file(tmp_path):
    values = {
        "fid": Value("fid", 1.5, 0.1, 10, "how", "note", 0.2, (1.1, 1.5), (1.4, 1.6)),
        "is": Value("is", float("nan"), None, 10, "how"),
    }
    evaluation = Evaluation(
        values, {"num_samples": 10, "reference": {"split": "test"}}, "abc", {"total": 1.25}, {"kid": "why"}
    )
    evaluation.save(tmp_path / "a.json")
    loaded = Evaluation.load(tmp_path / "a.json")
    assert loaded.values["fid"] == values["fid"] and loaded.values["is"].value != loaded.values["is"].value
    assert (loaded.protocol, loaded.fingerprint, loaded.seconds) == (evaluation.protocol, "abc", {"total": 1.25})
    assert loaded.omitted == {"kid": "why"}


@pytest.mark.parametrize("text", ["", "{}", '{"values": {"fid": {"nonsense": 1}}}', "[1]"])
def test_a_damaged_evaluation_is_named(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DiffxError, match=r"damaged .*; delete it and evaluate again"):
        Evaluation.load(file)


def test_splits_come_in_order_and_no_more_than_asked():
    images = digits().split("test")
    parts = list(in_batches(images, 50, 120))
    assert [len(part) for part in parts] == [50, 50, 20]
    assert torch.cat(parts).equal(images.get(torch.arange(120))["x"])
    assert sum(map(len, in_batches(images, 100))) == len(images)


# ---- images of any program ----


def write_images(folder, count=12):
    images = digits().split("train").get(torch.arange(count))
    for k in range(count):
        write_png(images["x"][k], folder / f"{k:03d}.png")
    array = images["x"].permute(0, 2, 3, 1).numpy()
    np.savez(folder.parent / "images.npz", arr_0=array, label=images["label"].numpy())
    return images


def test_a_folder_and_an_array_of_the_same_images_give_the_same_values(tmp_path):
    written = write_images(tmp_path / "folder")
    evaluator = evaluator_of("fd", "is")
    values = {name: evaluator.measure(load_images(tmp_path / name, 1, 8)).values for name in ("folder", "images.npz")}
    assert values["folder"] == values["images.npz"]
    direct = FrechetDistance(evaluator.references(12))
    direct.update(_observation(evaluator, written["x"]))
    assert values["folder"]["fd_digits"] == direct.compute()[0]


def _observation(evaluator, images):
    from diffx.metrics.base import Observation
    from diffx.metrics.extractors import extract

    features, logits = extract(evaluator.extractor, images)
    return Observation(images, None, torch.arange(len(images)), features, logits)


def test_images_that_cannot_be_compared_are_refused(tmp_path):
    write_images(tmp_path / "folder")
    with pytest.raises(DiffxError, match=r"no images.*|there are no images"):
        load_images(tmp_path / "absent", 1, 8)
    with pytest.raises(DiffxError, match="8x8 with 1 channels, but the reference is 16x16"):
        load_images(tmp_path / "folder", 1, 16)
    with pytest.raises(DiffxError, match="would change the metric"):
        load_images(tmp_path / "images.npz", 3, 8)
    write_png(torch.zeros(1, 9, 9, dtype=torch.uint8), tmp_path / "folder/odd.png")
    with pytest.raises(DiffxError, match=r"odd\.png' is 9x9"):
        load_images(tmp_path / "folder", 1, 8)
    (tmp_path / "folder/odd.png").write_bytes(b"no image")
    with pytest.raises(DiffxError, match=r"odd\.png' is no image"):
        load_images(tmp_path / "folder", 1, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffxError, match="no images"):
        load_images(tmp_path / "empty", 1, 8)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 1), dtype=np.float32))
    with pytest.raises(DiffxError, match="uint8"):
        load_images(tmp_path / "float.npz", 1, 8)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:200])
    with pytest.raises(DiffxError, match="damaged"):
        load_images(tmp_path / "cut.npz", 1, 8)


def test_evaluating_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator_of("fd", "is")(generator(), 20, snapshot=tmp_path / "s.safetensors")
