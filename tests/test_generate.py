"""Sample k of a seed is sample k, whatever the batch and the number of processes; so are the metrics of all samples."""

import dataclasses
import datetime
import json
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import build, choices, is_stochastic
from PIL import Image
from torch import Tensor

from diffx.autoencoders import Autoencoder, Pixels
from diffx.conditioning import LabelConditioner, Unconditional
from diffx.data import Digits
from diffx.denoisers import Denoiser, Preconditioned
from diffx.evaluation import Evaluation, Evaluator, in_batches
from diffx.generate import Generator
from diffx.metrics import Classifier, NoExtractor, Value
from diffx.pictures import grid, save_grid, write_png
from diffx.schedules import Cosine
from diffx.utils import DiffxError

torch.set_num_threads(1)

SHAPE, CLASSES, N = (1, 8, 8), 10, 16
SAMPLERS = choices("sampler")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


class Spy:
    """A sampler that keeps what it was given: the initial noise, and every noise by (step, draw)."""

    def __init__(self, sampler):
        self.sampler, self.initial, self.noises = sampler, [], {}

    def nfe(self, steps):
        return self.sampler.nfe(steps)

    def trajectory(self, denoiser, x, times, *, noise, **cond):
        self.initial.append(x.clone())

        def spied(step, draw=0):
            z = noise(step, draw)
            self.noises.setdefault((step, draw), []).append(z)
            return z

        yield from self.sampler.trajectory(denoiser, x, times, noise=spied, **cond)

    def seen(self):
        """What it was given, over all batches."""
        return {"initial": torch.cat(self.initial), **{key: torch.cat(z) for key, z in self.noises.items()}}


@lru_cache
def network():
    """A denoiser with weights that do not start at 0, so that every input moves the output."""
    torch.manual_seed(0)
    backbone = build("backbone", "unet_tiny", in_channels=1, image_size=8, num_classes=CLASSES)
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Preconditioned(backbone, build("schedule", "edm"), build("parameterization", "edm")).eval()


def generator_of(sampler="heun", **changes):
    spy = Spy(build("sampler", sampler) if isinstance(sampler, str) else sampler)
    generator = Generator(
        network(),
        spy,
        build("discretization", "karras"),
        3,
        Pixels(),
        LabelConditioner(CLASSES),
        SHAPE,
        num_classes=CLASSES,
    )
    return dataclasses.replace(generator, **changes), spy


def dealt(generator, batch_size, world_size=1, total=N):
    """All samples as `world_size` ranks make them one after the other, and the numbers in that order."""
    parts = [
        part for rank in range(world_size) for part in generator.batches(total, batch_size, "cpu", rank, world_size)
    ]
    index, label, images = (torch.cat(values) for values in zip(*parts, strict=True))
    return index, label, images


def assert_same_pictures(actual, expected):
    """Equal but for stray pixels that are rounded the other way."""
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


# ---- the noise and the images of a sample ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (1, 2), (3, 2), (16, 2), (3, 5)])
def test_a_sample_is_the_same_in_any_batch_on_any_rank(sampler, batch_size, world_size):
    reference, whole = generator_of(sampler)
    index, label, expected = dealt(reference, N)
    assert index.tolist() == list(range(N)) and label.tolist() == [k % CLASSES for k in range(N)]
    generator, spy = generator_of(sampler)
    numbers, labels, images = dealt(generator, batch_size, world_size)
    assert sorted(numbers.tolist()) == list(range(N))
    assert labels.equal(label[numbers])
    seen, wanted = spy.seen(), whole.seen()
    assert seen.keys() == wanted.keys()
    assert len(seen) > 1 or not is_stochastic(build("sampler", sampler))
    for key, noise in wanted.items():
        assert seen[key].equal(noise[numbers]), key
    assert_same_pictures(images, expected[numbers])
    assert len({image.numpy().tobytes() for image in images}) == N


def test_both_kinds_of_samplers_are_covered():
    assert {is_stochastic(build("sampler", sampler)) for sampler in SAMPLERS} == {True, False}


def test_noises_of_steps_samples_and_seeds_differ():
    noises = []
    for seed in (0, 1):
        generator, spy = generator_of("ddpm", seed=seed)
        dealt(generator, 4, total=4)
        noises += spy.seen().values()
    flat = torch.cat([noise.flatten(1) for noise in noises])
    assert len(flat) == 2 * 4 * 3  # seeds, samples; initial noise and that of two of three steps
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 0.6  # 64 numbers each


def test_the_initial_noise_has_the_standard_deviation_of_the_schedule():
    generator, spy = generator_of()
    dealt(generator, 500, total=500)
    _, sigma = generator.denoiser.schedule(generator.times()[:1])
    assert spy.seen()["initial"].std().item() == pytest.approx(sigma.item(), rel=0.02)


def test_given_labels_are_taken_and_change_the_picture_alone():
    generator, spy = generator_of()
    index = torch.arange(4)
    made, other = generator(index), generator(index, torch.full((4,), 7))
    assert made.label.tolist() == [0, 1, 2, 3] and other.label.tolist() == [7, 7, 7, 7]
    assert spy.initial[0].equal(spy.initial[1])
    assert not made.images.equal(other.images)


def test_default_labels_are_balanced():
    generator, _ = generator_of()
    assert torch.bincount(generator.labels(torch.arange(50))).tolist() == [5] * CLASSES
    # on each rank too, as far as they can be
    unlabelled, _ = generator_of(num_classes=0)
    assert unlabelled.labels(torch.arange(5)).tolist() == [0] * 5


def test_the_trajectory_ends_in_the_image():
    generator, _ = generator_of()
    index = torch.arange(3)
    latents = list(generator.trajectory(index))
    assert len(latents) == generator.steps
    assert Pixels().decode(latents[-1]).equal(generator(index).images)
    assert generator.nfe == 5  # Heun: 2·3 − 1


def test_sampling_touches_no_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    generator, _ = generator_of("ddpm")
    dealt(generator, 3)
    Evaluator(NoExtractor(), digits(), batch_size=7)(generator, 10)
    assert torch.rand(4).equal(expected)


def test_sampling_needs_no_gradients():
    generator, _ = generator_of()
    assert not any(latent.requires_grad for latent in generator.trajectory(torch.arange(2)))


def test_every_sample_is_dealt_once():
    generator, _ = generator_of(steps=1)
    for total, world_size in ((7, 3), (2, 4), (8, 2)):
        shares = [
            [int(k) for part in generator.batches(total, 2, "cpu", rank, world_size) for k in part.index]
            for rank in range(world_size)
        ]
        assert sorted(k for share in shares for k in share) == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_latents_are_decoded_by_the_autoencoder():
    class Halved(Autoencoder):
        """Latents of half the size, each pixel four times."""

        def encode(self, batch):
            raise AssertionError

        def decode(self, latent):
            return Pixels().decode(latent.repeat_interleave(2, 2).repeat_interleave(2, 3))

        def latent_shape(self, channels, image_size):
            return channels, image_size // 2, image_size // 2

    generator, _ = generator_of(autoencoder=Halved())
    images = generator(torch.arange(2)).images
    assert images.shape == (2, 1, 16, 16) and images[..., ::2, ::2].equal(images[..., 1::2, 1::2])


# ---- metrics ----


@lru_cache
def digits():
    return Digits(name="digits", channels=1, image_size=8, num_classes=CLASSES, batch_size=8, flip=False, num_workers=0)


def evaluator_of(**changes):
    settings = {"reference": "test", "batch_size": 7, "nearest": True} | changes
    return Evaluator(Classifier.shipped("digits"), digits(), **settings)


TOTAL = 41


def evaluate_on(rank, world_size, folder):
    """What a process of the test below does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    generator, _ = generator_of("ddim")
    values = evaluator_of()(generator, TOTAL, "cpu", rank, world_size)
    # the second process has nothing to do
    few = evaluator_of(nearest=False, batch_size=2000)
    values |= few.baselines(rank, world_size)
    values["one"] = few(generator, 1, "cpu", rank, world_size)["class_consistency"]
    (folder / f"{rank}.json").write_text(json.dumps({name: vars(value) for name, value in values.items()}))
    dist.destroy_process_group()


def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path):
    generator, _ = generator_of("ddim")
    expected = evaluator_of()(generator, TOTAL)
    assert {"fd_digits", "is_digits", "class_consistency"} < set(expected) and len(expected) >= 4
    assert expected["fd_digits"].n == TOTAL
    again = evaluator_of(batch_size=16)(generator, TOTAL)
    assert again["fd_digits"].value == pytest.approx(expected["fd_digits"].value, rel=1e-3)
    few = evaluator_of(nearest=False, batch_size=2000)
    expected |= few.baselines()
    expected["one"] = few(generator, 1)["class_consistency"]
    mp.spawn(evaluate_on, (2, tmp_path), nprocs=2)
    for rank in range(2):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(values) == list(expected)
        for name, value in expected.items():
            # a pixel rounded the other way, no more
            assert values[name]["value"] == pytest.approx(value.value, rel=2e-3), name
            assert values[name]["n"] == value.n
            if value.stderr is not None:
                assert values[name]["stderr"] == pytest.approx(value.stderr, rel=2e-2)


def test_progress_is_told():
    generator, _ = generator_of(steps=1)
    told = []
    Evaluator(NoExtractor(), digits(), batch_size=4)(generator, 10, on_batch=told.append)
    assert told == [4, 8, 10]


def test_baselines_frame_the_distance():
    evaluator = evaluator_of(nearest=False, batch_size=128)
    baselines = evaluator.baselines()
    assert list(baselines) == ["fd_digits_floor", "fd_digits_noise"]
    floor, noise = (value.value for value in baselines.values())
    assert 0 < floor < noise / 10
    assert Evaluator(NoExtractor(), digits()).baselines() == {}


def test_the_protocol_says_what_the_values_stand_on():
    protocol = evaluator_of().protocol()
    assert protocol["extractor"] == "digits" and len(protocol["weights_hash"]) == 64
    assert protocol["reference"] == {
        "data": "digits",
        "split": "test",
        "images": 360,
        "fingerprint": digits().split("test").fingerprint(),
    }
    assert (
        evaluator_of(reference="train").protocol()["reference"]["fingerprint"] != protocol["reference"]["fingerprint"]
    )


def test_an_extractor_for_other_images_is_refused():
    class Larger(Digits):
        pass

    source = Larger(name="larger", channels=3, image_size=32, num_classes=10, batch_size=8, flip=False, num_workers=0)
    with pytest.raises(DiffxError, match="3x32x32"):
        Evaluator(Classifier.shipped("digits"), source).check()


def test_an_evaluation_survives_its_file(tmp_path):
    values = {"fid": Value("fid", 1.5, 0.1, 10, "how", "note"), "is": Value("is", float("nan"), None, 10, "how")}
    evaluation = Evaluation(values, {"num_samples": 10, "reference": {"split": "test"}}, "abc", 1.25)
    evaluation.save(tmp_path / "a.json")
    loaded = Evaluation.load(tmp_path / "a.json")
    assert loaded.values["fid"] == values["fid"] and loaded.values["is"].value != loaded.values["is"].value
    assert (loaded.protocol, loaded.fingerprint, loaded.seconds) == (evaluation.protocol, "abc", 1.25)


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


# ---- pictures ----


def test_a_grid_is_laid_out_row_by_row():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4) * 10
    out = grid(images, columns=3, gap=1, least=1)
    assert out.dtype == torch.uint8 and out.shape == (3, 2 * 3 + 1, 3 * 5 + 1)
    for k in range(5):
        top, left = 1 + k // 3 * 3, 1 + k % 3 * 5
        assert (out[:, top : top + 2, left : left + 4] == 10 * k).all()
    gaps = torch.ones(out.shape[1:], dtype=torch.bool)
    for row in range(2):
        for column in range(3 if row == 0 else 2):
            gaps[1 + 3 * row : 3 + 3 * row, 1 + 5 * column : 5 + 5 * column] = False
    assert (out[:, gaps] == 96).all()


def test_small_grids_are_enlarged_by_whole_factors():
    images = torch.randint(0, 256, (4, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = grid(images, 2, least=1)
    large = grid(images, 2, least=3 * plain.shape[-1])
    assert large.equal(plain.repeat_interleave(3, 1).repeat_interleave(3, 2))
    assert grid(images, 2, least=plain.shape[-1] + 1).shape[-1] == 2 * plain.shape[-1]


class Painter(Denoiser):
    """Paints its label, plus a trace of the noise: x̂ of label c is about c/10."""

    def __init__(self):
        super().__init__()
        self.schedule = Cosine()

    def forward(self, x_t, t, **cond):
        label = cond.get("label", torch.zeros(len(x_t)))
        return label[:, None, None, None] / 10 + 0.01 * x_t.flatten(1)[:, :1, None, None].tanh().expand_as(x_t)


def cells(path, rows, columns, size=8, gap=1):
    """The images of a saved grid, `[rows, columns, size, size]`."""
    image = Image.open(path)
    assert image.mode == "L"
    width = columns * (size + gap) + gap
    factor = image.width // width
    assert image.size == (factor * width, factor * (rows * (size + gap) + gap))
    pixels = torch.tensor(list(image.getdata())).reshape(image.height, image.width)[::factor, ::factor]
    parts = pixels[gap:, gap:].unfold(0, size, size + gap).unfold(1, size, size + gap)
    assert parts.shape[:2] == (rows, columns)
    return parts


def test_a_saved_grid_has_a_row_for_each_class(tmp_path):
    generator, _ = generator_of(denoiser=Painter())
    save_grid(generator, tmp_path / "grid.png", per_class=3)
    parts = cells(tmp_path / "grid.png", CLASSES, 3)
    for row in range(CLASSES):
        for column in range(3):
            # sample k is of class k mod 10: the grid shows the very samples that are measured
            expected = generator(torch.tensor([column * CLASSES + row])).images[0, 0]
            assert (parts[row, column] - expected.int()).abs().max() <= 1
            assert parts[row, column].float().mean().item() == pytest.approx((row / 10 + 1) * 127.5, abs=2)


def test_a_grid_without_classes_is_square(tmp_path):
    generator, spy = generator_of(denoiser=Painter(), num_classes=0, conditioner=Unconditional())
    save_grid(generator, tmp_path / "grid.png", per_class=4)
    cells(tmp_path / "grid.png", 4, 4)
    plain, expected = generator_of(denoiser=Painter())
    plain(torch.arange(16))
    assert spy.seen()["initial"].equal(expected.seen()["initial"])


def test_many_classes_are_cut_to_twenty_rows(tmp_path):
    generator, spy = generator_of(denoiser=Painter(), num_classes=1000, conditioner=LabelConditioner(1000), steps=1)
    save_grid(generator, tmp_path / "grid.png", per_class=2)
    cells(tmp_path / "grid.png", 20, 2)
    assert len(spy.seen()["initial"]) == 40


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 3, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    write_png(image, tmp_path / "a.png")
    read: Tensor = torch.tensor(list(Image.open(tmp_path / "a.png").getdata()), dtype=torch.uint8)
    assert read.reshape(3, 5, channels).permute(2, 0, 1).equal(image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_times_fall_from_noisy_to_clean():
    generator, _ = generator_of()
    times = generator.times()
    assert times.dtype == torch.float64 and len(times) == generator.steps + 1 and times[-1] == 0
    assert all(t > s for t, s in pairwise(times.tolist()))
