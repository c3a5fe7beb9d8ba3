import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from diffx.backbones import Backbone, DiT, UNet
from diffx.backbones.dit import patchify, unpatchify
from diffx.nn import ConditionEmbedding, SelfAttention, sincos_positions, sinusoids
from diffx.utils import DiffxError

CONFIGS = Path(__file__).parent.parent / "configs" / "backbone"
CHOICES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

# the data each choice was published for or is meant for (channels, image_size, num_classes); 32x32x4 latents otherwise
DATA = {
    "unet_tiny": (1, 8, 10),
    "unet_digits": (1, 8, 10),
    "unet_28": (1, 28, 10),
    "dit_tiny": (1, 8, 10),
    "ddpm_cifar10": (3, 32, 0),
    "adm_imagenet64": (3, 64, 1000),
    "adm_imagenet128": (3, 128, 1000),
    "adm_imagenet256": (3, 256, 1000),
}


def build(choice, data=None, **overrides):
    channels, image_size, num_classes = data or DATA.get(choice, (4, 32, 1000))
    choices = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
    config = OmegaConf.create({"data": choices, "backbone": OmegaConf.load(CONFIGS / f"{choice}.yaml")})
    config.backbone.update(overrides)
    return instantiate(config.backbone)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def unet(**overrides):
    sizes = {"in_channels": 2, "out_channels": 4, "image_size": 8, "num_classes": 3}
    layers = {"base": 8, "mult": [1, 2], "blocks": 1, "attention": [4], "groups": 4}
    return UNet(**(sizes | layers | overrides))


NETWORKS = {
    "adm": lambda: unet(head_channels=4),
    "ddpm": lambda: unet(scale_shift=False, resblock_updown=False),
    "adm_conv": lambda: unet(resblock_updown=False, heads=2, attention=[]),
    "unlabelled": lambda: unet(num_classes=0, dropout=0.1),
    "dit": lambda: DiT(2, 8, 2, width=16, depth=2, heads=2, num_classes=3, out_channels=4),
    "dit_unlabelled": lambda: DiT(2, 8, 4, width=16, depth=2, heads=4, out_channels=4),
}
LABELLED = ["adm", "ddpm", "adm_conv", "dit"]


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


def perturbed(network):
    """As after some training: no layer is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return network.eval()


def batch(network, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 2, 8, 8, generator=generator, dtype=dtype)
    label = torch.arange(n) % 3 if network.embedding.num_classes else None
    return x, torch.linspace(-15, 15, n, dtype=dtype), label


# --------------------------------------------------------------------------------------------------------- all networks


def test_is_zero_at_first_with_its_shape(network):
    y = network(*batch(network))
    assert y.shape == (3, 4, 8, 8)
    assert torch.equal(y, torch.zeros_like(y))


def test_out_channels_default_to_in_channels():
    assert unet(out_channels=None)(torch.ones(1, 2, 8, 8), torch.zeros(1)).shape == (1, 2, 8, 8)
    assert DiT(3, 8, 2, width=16, depth=1, heads=1)(torch.ones(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)


def test_every_parameter_gets_a_gradient(network):
    perturbed(network)(*batch(network)).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []


def test_samples_do_not_see_each_other(network):
    network = perturbed(network).double()
    x, logsnr, label = batch(network, dtype=torch.float64)
    alone = [network(x[i : i + 1], logsnr[i : i + 1], None if label is None else label[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), network(x, logsnr, label), rtol=1e-9, atol=1e-9)


def test_depends_on_the_noise_level(network):
    network = perturbed(network)
    x, _, label = batch(network)
    y = [network(x, torch.full((3,), logsnr), label) for logsnr in (-20.0, 0.0, 0.1, 20.0)]
    for i in range(3):
        assert (y[i] - y[i + 1]).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("name", LABELLED)
def test_labels_differ_and_none_is_the_null_label(name):
    network = perturbed(NETWORKS[name]())
    x, logsnr, _ = batch(network)
    y = [network(x, logsnr, torch.full((3,), k)) for k in range(4)]
    for i in range(4):
        for j in range(i):
            assert (y[i] - y[j]).abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(network(x, logsnr), y[3])


def test_is_one_graph_without_a_look_at_the_data(network):
    x, logsnr, label = batch(network)
    torch._dynamo.reset()
    compiled = torch.compile(network.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, logsnr, label), network(x, logsnr, label))
    # a meta tensor has no values: whatever reads one fails
    network.to("meta")(x.to("meta"), logsnr.to("meta"), None if label is None else label.to("meta"))


def test_runs_in_bfloat16(network):
    network = perturbed(network)
    x, logsnr, label = batch(network)
    expected = network(x, logsnr, label)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, logsnr, label)
    pure = network.bfloat16()(x.bfloat16(), logsnr, label)
    for y in (mixed, pure):
        assert y.isfinite().all()
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_channels_last_changes_nothing(network):
    network = perturbed(network).double()
    x, logsnr, label = batch(network, dtype=torch.float64)
    expected = network(x, logsnr, label)
    y = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), logsnr, label)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resblock_updown", [True, False])
def test_unet_keeps_channels_last_throughout(scale_shift, resblock_updown):
    network = perturbed(unet(scale_shift=scale_shift, resblock_updown=resblock_updown))
    network.to(memory_format=torch.channels_last)
    strays = []

    def look(module, _, y):
        if y.ndim == 4 and not y.is_contiguous(memory_format=torch.channels_last):
            strays.append(module)

    for module in network.modules():
        module.register_forward_hook(look)
    network(torch.ones(2, 2, 8, 8).to(memory_format=torch.channels_last), torch.zeros(2))
    assert strays == []


# ---------------------------------------------------------------------------------------------------------- size, files


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_and_has_the_shape_of_its_data(choice):
    channels, size, num_classes = DATA.get(choice, (4, 32, 1000))
    with torch.device("meta"):
        network = build(choice)
        label = torch.zeros(2, dtype=torch.long) if num_classes else None
        y = network(torch.empty(2, channels, size, size), torch.empty(2), label)
    assert isinstance(network, Backbone)
    assert y.shape == (2, channels, size, size)


@pytest.mark.parametrize("choice", ["unet_tiny", "unet_digits", "unet_28", "dit_tiny"])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_small_choices_run(choice, num_classes):
    channels, size, _ = DATA[choice]
    network = build(choice, (channels, size, num_classes))
    label = torch.tensor([0, 10]) if num_classes else None
    y = network(torch.ones(2, channels, size, size), torch.zeros(2), label)
    assert torch.equal(y, torch.zeros(2, channels, size, size))


def test_tiny_choices_are_tiny():
    assert parameters(build("unet_tiny")) < 100_000
    assert parameters(build("dit_tiny")) < 100_000


@pytest.mark.parametrize(
    ("choice", "published", "overrides"),
    [
        ("ddpm_cifar10", 35.7, {}),
        ("adm_imagenet64", 295.9, {"out_channels": 6}),
        ("adm_imagenet128", 421.5, {"out_channels": 6}),
        ("adm_imagenet256", 553.8, {"out_channels": 6}),
        ("adm_imagenet256", 552.8, {"out_channels": 6, "num_classes": 0}),
    ],
)
def test_unet_sizes_are_the_published_ones(choice, published, overrides):
    # in millions; out_channels 6: a learned variance. Our row for the null label is not in ADM's count.
    with torch.device("meta"):
        network = build(choice, **overrides)
    null_row = 0 if network.embedding.label is None else network.embedding.label.embedding_dim
    assert round((parameters(network) - null_row) / 1e6, 1) == published


@pytest.mark.parametrize(
    ("choice", "published"), [("dit_s_2", 33), ("dit_b_2", 130), ("dit_l_2", 458), ("dit_xl_2", 675)]
)
def test_dit_sizes_are_the_published_ones(choice, published):
    with torch.device("meta"):
        network = build(choice, out_channels=8)
    assert round(parameters(network) / 1e6) == published


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_dit_sizes_follow_from_the_layers(size, patch):
    with torch.device("meta"):
        network = build(f"dit_{size}_{patch}", out_channels=8)
    D, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}[size]
    attention, mlp, modulation = 4 * D * D + 4 * D, 8 * D * D + 5 * D, 6 * D * D + 6 * D
    level, label = 256 * D + D + D * D + D, 1001 * D
    patches_in, final = 4 * patch**2 * D + D, 2 * D * D + 2 * D + D * 8 * patch**2 + 8 * patch**2
    assert parameters(network) == depth * (attention + mlp + modulation) + level + label + patches_in + final


def test_dit_xl_2_is_the_published_one_exactly():
    # 675,129,632 as its authors count: with the fixed position embedding of 16 * 16 tokens, here a buffer
    with torch.device("meta"):
        network = build("dit_xl_2", out_channels=8)
    assert parameters(network) + network.positions.numel() == 675_129_632


# ---------------------------------------------------------------------------------------------- DDPM, against diffusers


def ddpm_weights(reference):
    """The state of diffusers' U-Net under our names."""
    norms = {"norm": "norm1", "conv_1": "conv1", "condition.project": "time_emb_proj", "condition.norm": "norm2"}
    residual = norms | {"conv_2": "conv2", "skip": "conv_shortcut"}

    def block(ours, module):
        for name, theirs in residual.items():
            yield from layer(f"{ours}.{name}", getattr(module, theirs, None))

    def attention(ours, module):
        yield from layer(f"{ours}.norm", module.group_norm)
        for kind in ("weight", "bias"):
            qkv = [getattr(linear, kind) for linear in (module.to_q, module.to_k, module.to_v)]
            yield f"{ours}.attention.qkv.{kind}", torch.cat(qkv)
        yield from layer(f"{ours}.attention.out", module.to_out[0])

    def layer(ours, module):
        for name, p in module.named_parameters() if module is not None else ():
            yield f"{ours}.{name}", p

    def stages(ours, levels, resampler):
        number = 0
        for level in levels:
            for i, resnet in enumerate(level.resnets):
                yield from block(f"{ours}.{number}.0", resnet)
                if hasattr(level, "attentions"):
                    yield from attention(f"{ours}.{number}.1", level.attentions[i])
                number += 1
            if resamplers := getattr(level, resampler):
                last = f"{number}.0" if ours == "down" else f"{number - 1}.{1 + hasattr(level, 'attentions')}"
                yield from layer(f"{ours}.{last}", resamplers[0])
                number += ours == "down"

    yield from layer("conv_in", reference.conv_in)
    yield from stages("down", reference.down_blocks, "downsamplers")
    yield from block("middle.0", reference.mid_block.resnets[0])
    yield from attention("middle.1", reference.mid_block.attentions[0])
    yield from block("middle.2", reference.mid_block.resnets[1])
    yield from stages("up", reference.up_blocks, "upsamplers")
    yield from layer("norm_out", reference.conv_norm_out)
    yield from layer("conv_out", reference.conv_out)


class Given(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, logsnr, label):
        return self.embedding


def test_ddpm_unet_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=4,
        downsample_padding=1,
    ).double()
    network = UNet(3, 8, 8, [1, 2, 2], 2, [4], scale_shift=False, resblock_updown=False, groups=4).double()
    assert parameters(network) == parameters(reference)
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 700])
    # the noise level is embedded in another way: it is given as diffusers embeds it
    network.embedding = Given(torch.nn.functional.silu(reference.time_embedding(reference.time_proj(t).double())))
    network.load_state_dict(dict(ddpm_weights(reference)) | network.embedding.state_dict(prefix="embedding."))
    torch.testing.assert_close(network(x, torch.zeros(2)), reference(x, t).sample, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- pieces


def test_unet_takes_28_pixels_down_to_7_and_other_sizes():
    network = unet(image_size=28, mult=[1, 2, 2], attention=[7])
    sizes = []
    network.middle.register_forward_hook(lambda module, _, y: sizes.append(tuple(y.shape[2:])))
    label = torch.zeros(1, dtype=torch.long)
    assert network(torch.ones(1, 2, 28, 28), torch.zeros(1), label).shape == (1, 4, 28, 28)
    assert network(torch.ones(1, 2, 12, 20), torch.zeros(1), label).shape == (1, 4, 12, 20)
    assert sizes == [(7, 7), (3, 5)]


def test_attention_sits_at_the_resolutions_asked_for():
    network = unet(image_size=32, mult=[1, 1, 2, 2], attention=[16, 4])
    seen = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda module, _, y: seen.append(math.isqrt(y.shape[1])))
    network(torch.ones(1, 2, 32, 32), torch.zeros(1))
    assert seen == [16, 4, 4, 4, 4, 16, 16]


def test_dropout_acts_in_training_only():
    network = perturbed(unet(dropout=0.5))
    x, logsnr, label = batch(network)
    torch.testing.assert_close(network(x, logsnr, label), network(x, logsnr, label), rtol=0, atol=0)
    network.train()
    assert not torch.allclose(network(x, logsnr, label), network(x, logsnr, label))


def test_patches_are_put_together_again():
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    patches = patchify(x, 2)
    assert patches.shape == (2, 16, 12)
    assert torch.equal(patches[1, 5].reshape(3, 2, 2), x[1, :, 2:4, 2:4])
    assert torch.equal(unpatchify(patches, 2, 4), x)


def test_positions_are_known_by_their_offset():
    positions = sincos_positions(6, 32).double()
    products = (positions @ positions.T).reshape(6, 6, 6, 6)
    torch.testing.assert_close(products[0, 0, 1, 3], products[2, 1, 3, 4])
    assert torch.unique(positions, dim=0).shape == (36, 32)
    assert positions.abs().max() <= 1
    # half of the channels know the row alone, half the column
    grid = positions.reshape(6, 6, 2, 16)
    assert torch.equal(grid[2, 0, 0], grid[2, 5, 0])
    assert torch.equal(grid[0, 2, 1], grid[5, 2, 1])


def test_noise_levels_are_told_apart_over_the_whole_range():
    levels = torch.linspace(-40, 40, 1601)
    features = sinusoids(levels, 32)
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances + 10 * torch.eye(1601)).min() > 0.05
    assert features.dtype == torch.float32
    assert sinusoids(levels.double(), 32).dtype == torch.float64
    # cosines of wavelengths 160 … 1, then their sines
    torch.testing.assert_close(
        sinusoids(torch.tensor([40.0]), 4), torch.tensor([[0.0, 1.0, 1.0, 0.0]]), atol=1e-4, rtol=0
    )


def test_embedding_adds_a_row_per_class():
    embedding = ConditionEmbedding(8, 16, 3)
    assert embedding.label.weight.shape == (4, 16)
    assert ConditionEmbedding(8, 16, 0).label is None


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: unet(image_size=28, mult=[1, 1, 1, 1], attention=[]), "multiple of 8"),
        (lambda: unet(attention=[16]), r"resolution 16, but the network has only \[8, 4\]"),
        (lambda: unet(groups=3), "divisor of 8"),
        (lambda: unet(head_channels=5), "head_channels is 5"),
        (lambda: unet(heads=3), "3 heads do not divide"),
        (lambda: unet(heads=2, head_channels=4), "both given"),
        (lambda: unet(num_classes=-1), "num_classes is -1"),
        (lambda: unet(base=9, groups=3, attention=[]), "even number of features"),
        (lambda: unet(mult=[]), "at least one level"),
        (lambda: unet()(torch.ones(1, 2, 8, 9), torch.zeros(1)), r"multiples of 2, not \[1, 2, 8, 9\]"),
        (lambda: unet()(torch.ones(1, 3, 8, 8), torch.zeros(1)), r"\[B, 2, H, W\]"),
        (
            lambda: NETWORKS["unlabelled"]()(torch.ones(1, 2, 8, 8), torch.zeros(1), torch.tensor([1])),
            "labels are given",
        ),
        (lambda: DiT(2, 9, 2, width=16, depth=1, heads=1), "multiple of 2"),
        (lambda: DiT(2, 8, 2, width=18, depth=1, heads=1), "multiple of 4"),
        (lambda: DiT(2, 8, 2, width=16, depth=1, heads=3), "3 heads do not divide 16"),
        (lambda: NETWORKS["dit"]()(torch.ones(1, 2, 16, 16), torch.zeros(1)), r"\[B, 2, 8, 8\], not \[1, 2, 16, 16\]"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(DiffxError, match=message):
        mistake()
