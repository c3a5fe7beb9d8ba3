"""Sample k of a seed is sample k, whatever the batch and the number of processes; and pictures of samples."""

import dataclasses
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from conftest import build, choices, is_stochastic
from PIL import Image
from torch import Tensor

from diffx.autoencoders import Autoencoder, Pixels
from diffx.conditioning import LabelConditioner, Unconditional
from diffx.denoisers import Denoiser, LearnedVariance
from diffx.generate import Generator
from diffx.pictures import grid, save_animation, save_grid, save_pairs, save_trajectory, write_png
from diffx.plots import Curve, plot_curves, plot_strip
from diffx.schedules import Cosine
from diffx.utils import DiffxError

torch.set_num_threads(1)

SHAPE, CLASSES, N = (1, 8, 8), 10, 16
SAMPLERS = choices("sampler")


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
    backbone = build("backbone", "unet_tiny", in_channels=1, out_channels=2, image_size=8, num_classes=CLASSES)
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    # one that knows a variance too, for the sampler that asks
    return LearnedVariance(backbone, build("schedule", "edm"), build("parameterization", "edm")).eval()


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


def test_samples_that_are_not_finite_are_refused():
    generator, _ = generator_of()

    class Broken(Denoiser):
        def __init__(self, denoiser):
            super().__init__()
            self.inner, self.schedule = denoiser, denoiser.schedule

        def forward(self, x_t, t, **cond):
            x_hat = self.inner(x_t, t, **cond)
            return torch.where(cond["label"][:, None, None, None] == 2, torch.nan, x_hat)

    generator = dataclasses.replace(generator, denoiser=Broken(network()))
    with pytest.raises(DiffxError, match=r"1 of 4 samples are not finite \(the first is sample 2\)"):
        generator(torch.arange(4))


def test_a_trajectory_shows_noise_above_estimates_and_ends_in_the_sample(tmp_path):
    generator, _ = generator_of("euler", steps=5)
    save_trajectory(generator, tmp_path / "t.png", torch.arange(2), columns=3)
    with Image.open(tmp_path / "t.png") as image:
        picture = torch.tensor(list(image.getdata())).reshape(image.size[1], image.size[0])
    factor = picture.shape[1] // (3 * 9 + 1)
    cells = picture[factor // 2 :: factor, factor // 2 :: factor]
    assert cells.shape == (4 * 9 + 1, 3 * 9 + 1)
    sample = generator(torch.arange(2)).images
    for b in range(2):
        for row in (2 * b, 2 * b + 1):  # the last column of both rows is the sample itself
            assert (cells[1 + 9 * row : 9 + 9 * row, 19:27] - sample[b, 0]).abs().max() <= 1


def test_pairs_stand_above_each_other(tmp_path):
    above = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 1, 1) * 10
    save_pairs(above, above + 1, tmp_path / "p.png", columns=2)
    with Image.open(tmp_path / "p.png") as image:
        factor = image.size[0] // 5
        pixels = [[image.getpixel((x * factor, y * factor)) for x in (1, 3)] for y in (1, 3, 5, 7)]
    assert pixels == [[0, 10], [1, 11], [20, 96], [21, 96]]


def test_pictures_over_training_become_a_strip_and_an_animation(tmp_path):
    for k in range(3):
        write_png(torch.full((1, 8, 8), 80 * k, dtype=torch.uint8), tmp_path / f"{k}.png")
    files = [tmp_path / f"{k}.png" for k in range(3)]
    save_animation(files, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
    plot_strip({"step 0": files[0], "step 1": files[1]}, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as image:
        assert image.size[0] > image.size[1]


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_plots_are_the_same_bytes_for_the_same_numbers(tmp_path, suffix):
    curves = {"a": Curve([5, 10, 20], [3.0, 2.0, 1.5], [0.1, None, 0.2]), "b": Curve([5, 10], [4.0, 2.5], [0.1, 0.1])}
    for name in ("one", "two"):
        plot_curves(curves, tmp_path / f"{name}{suffix}", "NFE", "fid", log_x=True)
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_times_fall_from_noisy_to_clean():
    generator, _ = generator_of()
    times = generator.times()
    assert times.dtype == torch.float64 and len(times) == generator.steps + 1 and times[-1] == 0
    assert all(t > s for t, s in pairwise(times.tolist()))
