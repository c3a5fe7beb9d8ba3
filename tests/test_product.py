"""Every part goes with every other: whatever can be named on the command line trains and samples, or is refused."""

import dataclasses
import itertools
import math
from functools import lru_cache

import pytest
import torch
from conftest import build, choices, complete, in_pairs, keyed_noise

from diffx.autoencoders import Pixels
from diffx.cli.budget import set_steps
from diffx.cli.build import build as assemble
from diffx.cli.compose import compose_config
from diffx.conditioning import LabelConditioner
from diffx.denoisers import LearnedVariance, Preconditioned
from diffx.generate import Generator
from diffx.objectives import Denoising
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)

SHAPE, CLASSES, BATCH = (1, 8, 8), 10, 4
IMAGES = {"in_channels": SHAPE[0], "image_size": SHAPE[1], "num_classes": CLASSES}
BACKBONES = ("unet_tiny", "dit_tiny")


def undefined(schedule, parameterization):
    """Whether x̂ would be divided by an α of 0 at the noisy end."""
    with torch.no_grad():
        ends = build("parameterization", parameterization)(*build("schedule", schedule)(torch.ones(())))
    return not all(math.isfinite(c) for c in ends)


# every two choices of two families meet; every triple would take hours
TRAINED = in_pairs(*map(complete, ("schedule", "parameterization", "weighting", "time_sampler")), BACKBONES)
DEFINED = [names for names in TRAINED if not undefined(*names[:2])]
UNDEFINED = [pair for pair in itertools.product(choices("schedule"), choices("parameterization")) if undefined(*pair)]
SAMPLED = in_pairs(*map(complete, ("sampler", "discretization", "guidance", "thresholding")))


def denoiser_of(schedule, parameterization, backbone, kind=Preconditioned):
    """A denoiser whose network does not start at 0, as fresh ones do: nothing is hidden by it."""
    torch.manual_seed(0)
    network = build("backbone", backbone, **IMAGES, out_channels=kind.outputs * SHAPE[0])
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return kind(network, build("schedule", schedule), build("parameterization", parameterization))


def batch():
    """Images in [−1, 1], labels and keys of one batch."""
    keys = Keys(0, torch.arange(BATCH))
    return keys.uniform("x", *SHAPE) * 2 - 1, torch.arange(BATCH), keys


@pytest.mark.parametrize(("schedule", "parameterization", "weighting", "time_sampler", "backbone"), DEFINED)
def test_a_training_step_and_a_sampler_step(schedule, parameterization, weighting, time_sampler, backbone):
    denoiser = denoiser_of(schedule, parameterization, backbone)
    objective = Denoising(build("time_sampler", time_sampler), build("weighting", weighting))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in denoiser.parameters()]
    x, label, keys = batch()

    terms = objective(denoiser, x, keys, label=label)
    assert {name: (term.shape, term.dtype) for name, term in terms.items()} == {
        "loss": ((BATCH,), torch.float32),
        "logsnr": ((BATCH,), torch.float32),
    }
    assert terms["loss"].isfinite().all() and (terms["loss"] > 0).all()
    assert terms["logsnr"].isfinite().all()
    terms["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())
    optimizer.step()
    assert all(p.isfinite().all() for p in denoiser.parameters())
    moved = [not p.equal(old) for p, old in zip(denoiser.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2

    times = torch.tensor([1.0, 0.6], dtype=torch.float64)
    sampler, noise = build("sampler", "ddpm"), keyed_noise(torch.arange(BATCH), SHAPE, dtype=torch.float32)
    with torch.no_grad():
        _, sigma = denoiser.schedule(times[:1])
        x_T = keys.normal("sample", *SHAPE) * sigma.float()
        x_hat = denoiser(x_T, times[0].float(), label=label)
        x_s = sampler(denoiser, x_T, times, noise=noise, label=label)
    for value in (x_hat, x_s):
        assert value.shape == x.shape and value.dtype == torch.float32 and value.isfinite().all()


def test_some_combinations_are_undefined():
    assert ("flow", "eps") in UNDEFINED  # otherwise the test below would test nothing


@pytest.mark.parametrize(("schedule", "parameterization"), UNDEFINED)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_undefined_combinations_are_refused_with_the_remedy(schedule, parameterization, backbone):
    with pytest.raises(DiffxError, match="alpha reaches 0") as refusal:
        denoiser_of(schedule, parameterization, backbone)
    assert "parameterization=v" in str(refusal.value) and "\n" not in str(refusal.value)


@lru_cache
def one_denoiser():
    # one that knows a variance too, for the sampler that asks
    return denoiser_of("cosine", "v", "unet_tiny", LearnedVariance).eval()


@pytest.mark.parametrize(("sampler", "discretization", "guidance", "thresholding"), SAMPLED)
def test_images_from_every_way_of_sampling(sampler, discretization, guidance, thresholding):
    conditioner = LabelConditioner(CLASSES)
    guided = build("guidance", guidance)(one_denoiser(), conditioner)
    generator = Generator(
        build("thresholding", thresholding)(guided),
        build("sampler", sampler),
        build("discretization", discretization),
        2,
        Pixels(),
        conditioner,
        SHAPE,
        num_classes=CLASSES,
    )
    index = torch.arange(3)
    latents = list(generator.trajectory(index))
    assert len(latents) == 2
    for latent in latents:
        assert latent.shape == (3, *SHAPE) and latent.dtype == torch.float32 and latent.isfinite().all()
    made = generator(index)
    assert made.images.shape == (3, *SHAPE) and made.images.dtype == torch.uint8
    assert made.label.tolist() == [0, 1, 2]
    assert not made.images[0].equal(made.images[1])


# what takes more than about 10 s or 3 GB is made smaller, in depth or width alone; all others run at full size
SMALLER = {
    "dit_imagenet256": ["backbone.depth=2"],
    "flow_matching_cifar10": ["backbone.base=64"],
    "simple_imagenet128": ["backbone.base=32", "backbone.blocks=[1,1,1,2,1]"],
    "sit_imagenet256": ["backbone.depth=2"],
    "vdm_cifar10": ["backbone.blocks=8"],
}
# latents of the right shape from no autoencoder: its weights and its shards cannot be had here
LATENTS = ["data=cifar10", "data.channels=4", "data.num_classes=1000", "autoencoder=pixels", "~autoencoder.weights"]
STAND_INS = {"dit_imagenet256": LATENTS, "sit_imagenet256": LATENTS}
# variants that the recipes' comments name, with fewer blocks or layers
VARIANTS = [
    "edm_cifar10 backbone=ncsnpp_cifar10 name=edm_cifar10_ve backbone.blocks=1",
    "edm_cifar10_uncond backbone=ncsnpp_cifar10 name=edm_cifar10_uncond_ve backbone.blocks=1",
    "edm_cifar10 augmentation=none backbone.blocks=1",
    "dit_imagenet256 backbone=dit_b_4 name=dit_b_4",
    "sit_imagenet256 backbone=dit_b_2 name=sit_b_2",
]


@pytest.mark.parametrize("words", [*choices("experiment"), *VARIANTS])
def test_every_experiment_survives_two_steps_and_a_sample(words):
    # stand-in images of the right shape: the data sets themselves cannot be had here
    experiment, *overrides = words.split()
    overrides += [*SMALLER.get(experiment, []), *STAND_INS.get(experiment, [])]
    overrides += [f"experiment={experiment}", "extractor=none", "trainer=cpu"]
    arm = assemble(compose_config("train", overrides, [], set_steps))
    optimizer = arm.module.configure_optimizers()["optimizer"]
    source = arm.source
    shape = (2, source.channels, source.image_size, source.image_size)
    for step in range(2):
        index = torch.arange(2) + 2 * step
        images = (Keys(0, index).uniform("stand-in", *shape[1:]) * 256).to(torch.uint8)
        batch = {"x": images, "label": index % max(source.num_classes, 1), "index": index}
        loss = arm.module.training_step(batch, step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        arm.module.ema.update(arm.module.denoiser, step + 1)
        assert loss.isfinite()
    generator = dataclasses.replace(arm.generator(arm.module.ema.denoiser), steps=2)
    made = generator(torch.arange(1))
    assert made.images.shape == (1, *shape[1:]) and made.images.dtype == torch.uint8
