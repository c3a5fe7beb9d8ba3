"""Every network keeps the contract, has the published size, and computes what an independent one does."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from diffx.backbones import Backbone, DiT, FlatUNet, ScoreUNet, SimpleUNet, UNet
from diffx.backbones.dit import patchify, unpatchify
from diffx.backbones.score_unet import Block, FIRDown, FIRUp
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
    "iddpm_cifar10": (3, 32, 0),
    "flow_matching_cifar10": (3, 32, 0),
    "vdm_cifar10": (3, 32, 0),
    "ddpmpp_cifar10": (3, 32, 10),
    "ncsnpp_cifar10": (3, 32, 10),
    "simple_imagenet128": (3, 128, 1000),
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


def score_unet(switch, **overrides):
    sizes = {"in_channels": 2, "out_channels": 4, "image_size": 8, "num_classes": 3, "augment_labels": 5}
    layers = {"base": 8, "mult": [2, 1], "blocks": 1, "attention": [4], "fir": switch, "pyramid": switch}
    return ScoreUNet(**(sizes | layers | {"fourier": switch} | overrides))


NETWORKS = {
    "adm": lambda: unet(head_channels=4),
    "ddpm": lambda: unet(scale_shift=False, resblock_updown=False),
    "adm_conv": lambda: unet(resblock_updown=False, heads=2, attention=[]),
    "unlabelled": lambda: unet(num_classes=0, dropout=0.1),
    "dit": lambda: DiT(2, 8, 2, width=16, depth=2, heads=2, num_classes=3, out_channels=4),
    "dit_unlabelled": lambda: DiT(2, 8, 4, width=16, depth=2, heads=4, out_channels=4),
    "ddpmpp": lambda: score_unet(False),
    "ncsnpp": lambda: score_unet(True),
    "ncsnpp_unlabelled": lambda: score_unet(True, num_classes=0, augment_labels=0, dropout=0.1),
    "simple": lambda: SimpleUNet(
        2, 8, 8, [1, 2], [1, 2], [4], heads=2, embedding=16, groups=4, num_classes=3, out_channels=4
    ),
    # the frequencies of the published network tell what bfloat16 cannot
    "vdm": lambda: FlatUNet(2, 8, 8, 2, exponents=[0, 1], dropout=0.0, groups=4, num_classes=3, out_channels=4),
}
LABELLED = ["adm", "ddpm", "adm_conv", "dit", "ddpmpp", "ncsnpp", "simple", "vdm"]


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
    label = torch.arange(n) % 3 if getattr(network, "unet", network).embedding.num_classes else None
    return x, torch.linspace(-15, 15, n, dtype=dtype), label


# --------------------------------------------------------------------------------------------------------- all networks


def test_is_zero_at_first_with_its_shape(network):
    x, *rest = batch(network)
    y = network(x, *rest)
    assert y.shape == (3, 4, 8, 8)
    # VDM's gives the input at first, and zero for what the input has not
    start = torch.cat([x, torch.zeros_like(x)], dim=1) if isinstance(network, FlatUNet) else torch.zeros_like(y)
    assert torch.equal(y, start)


def test_out_channels_default_to_in_channels():
    assert unet(out_channels=None)(torch.ones(1, 2, 8, 8), torch.zeros(1)).shape == (1, 2, 8, 8)
    assert DiT(3, 8, 2, width=16, depth=1, heads=1)(torch.ones(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)


def test_every_parameter_gets_a_gradient(network):
    # told of no augmentation, the weights that embed one have a gradient of zero
    told = {"augment": torch.ones(3, network.augment_labels)} if network.augment_labels else {}
    perturbed(network)(*batch(network), **told).square().mean().backward()
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


@pytest.mark.parametrize(
    ("choice", "num_classes", "count", "overrides"),
    [
        # arXiv 2206.00364: the authors' networks of these settings, counted
        ("ddpmpp_cifar10", 0, 55_733_891, {"augment_labels": 9}),
        ("ddpmpp_cifar10", 10, 55_735_299, {"augment_labels": 9}),
        ("ncsnpp_cifar10", 0, 56_397_827, {"augment_labels": 9}),
        ("ncsnpp_cifar10", 10, 56_400_643, {"augment_labels": 9}),
        # arXiv 2102.09672: the authors' network of these settings, counted; they name its checkpoint "50M"
        ("iddpm_cifar10", 0, 52_546_438, {"out_channels": 6}),
        ("iddpm_cifar10", 0, 52_542_979, {}),
    ],
)
def test_counts_are_those_of_the_released_networks(choice, num_classes, count, overrides):
    with torch.device("meta"):
        assert parameters(build(choice, (3, 32, num_classes), **overrides)) == count


def conv(a, b, k=3):
    return k * k * a * b + b


def linear(a, b):
    return a * b + b


def test_vdm_s_count_follows_from_its_description():
    # arXiv 2107.00630 gives no number. 32 blocks down, 2 in the middle, 33 up, all of 128 channels, at first one width
    D, E = 128, 512
    plain = 2 * D + conv(D, D) + E * D + 2 * D + conv(D, D)  # the conditioning without a bias, as in the released code
    joined = 2 * 2 * D + conv(2 * D, D) + E * D + 2 * D + conv(D, D) + linear(2 * D, D)
    attention = 2 * D + 4 * linear(D, D)
    ends = conv(3 * 5, D) + 2 * D + conv(D, 3)
    level = linear(D, E) + linear(E, E)
    count = 34 * plain + 33 * joined + attention + ends + level
    with torch.device("meta"):
        network = build("vdm_cifar10")
    assert parameters(network) == count + 67 * D  # a bias in the conditioning of each block
    assert parameters(network) == 30_586_243


def test_flow_matching_s_count_follows_from_its_table():
    # arXiv 2210.02747 gives no number: table 3 with ADM's blocks
    D = [256, 512, 512, 512]
    E = 4 * 256

    def block(a, b):
        return 2 * a + conv(a, b) + linear(E, 2 * b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    attention = 2 * 512 + 4 * linear(512, 512)
    count = conv(3, 256) + linear(256, E) + linear(E, E)
    skips, width = [256], 256
    for level, d in enumerate(D):
        if level:
            count += block(width, width)
            skips.append(width)
        for _ in range(2):
            count += block(width, d) + attention * (level == 1)
            skips.append(d)
            width = d
    count += 2 * block(512, 512) + attention
    for level in reversed(range(4)):
        for _ in range(3):
            count += block(width + skips.pop(), D[level]) + attention * (level == 1)
            width = D[level]
        count += block(width, width) * (level > 0)
    count += 2 * 256 + conv(256, 3)
    with torch.device("meta"):
        assert parameters(build("flow_matching_cifar10")) == count == 171_268_099


def test_simple_diffusion_s_count_follows_from_its_layers():
    # arXiv 2301.11093 gives no number for this network
    D, N, E = [128, 256, 512, 1024, 1024], [3, 4, 4, 12, 4], 1024

    def block(d, joins=False):
        return 2 * conv(d, d) + linear(E, 2 * d) + 2 * 2 * d + 2 * d * joins

    count = conv(3, D[0]) + linear(128, E) + linear(E, E) + 1001 * E + 2 * D[0] + conv(D[0], 3)
    for level, (d, n) in enumerate(zip(D, N, strict=True)):
        attention = 2 * d + 4 * linear(d, d)
        count += n * (block(d) + block(d, joins=True)) + 2 * n * attention * (level >= 3)
        count += (linear(D[level - 1], d) + linear(d, D[level - 1])) * (level > 0)
    count += 2 * block(1024) + 2 * 1024 + 4 * linear(1024, 1024)
    with torch.device("meta"):
        assert parameters(build("simple_imagenet128")) == count == 920_823_299


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


# ------------------------------------------------------------------------------- DDPM++, NCSN++ and DiT, by other means


def filtered(image, taps):
    """Both axes of an image filtered by scipy, zeros beyond the border."""
    signal = pytest.importorskip("scipy.signal")
    return torch.tensor(signal.convolve2d(image.numpy(), torch.outer(taps, taps).numpy()))


def test_fir_resampling_equals_scipy():
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    down, up = FIRDown().double()(x), FIRUp().double()(x)
    assert down.shape == (1, 2, 3, 4) and up.shape == (1, 2, 12, 16)
    for channel in range(2):
        # output pixel i is the mean of the input at 2 i − 1 … 2 i + 2: entry 2 i + 2 of the full convolution
        torch.testing.assert_close(down[0, channel], filtered(x[0, channel], taps / 8)[2::2, 2::2][:3, :4])
        stuffed = torch.zeros(12, 16, dtype=torch.float64)
        stuffed[::2, ::2] = x[0, channel]
        torch.testing.assert_close(up[0, channel], filtered(stuffed, taps / 4)[1:13, 1:17])


def test_fir_resampling_keeps_a_constant():
    x = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(FIRDown()(x)[..., 1:-1, 1:-1], torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(FIRUp()(x)[..., 2:-2, 2:-2], torch.ones(1, 3, 12, 12))


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("way", ["down", "up", "wider", "same"])
def test_score_unet_blocks_equal_diffusers(fir, way):
    resnet = pytest.importorskip("diffusers.models.resnet")
    attention = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    new = 24 if way == "wider" else 16
    resample = {"down": FIRDown() if fir else nn.AvgPool2d(2), "up": FIRUp() if fir else nn.Upsample(scale_factor=2.0)}
    ours = Block(12, 0.0, 16, new, resample.get(way), attention=True).double()
    theirs = resnet.ResnetBlock2D(
        in_channels=16,
        out_channels=new,
        temb_channels=12,
        groups=4,
        groups_out=new // 4,
        eps=1e-6,
        output_scale_factor=math.sqrt(2),
        use_in_shortcut=way != "same",
        kernel="fir" if fir else None,
        down=way == "down",
        up=way == "up",
    ).double()
    attend = attention.Attention(
        new, heads=1, dim_head=new, norm_num_groups=new // 4, eps=1e-6, bias=True, residual_connection=True,
        rescale_output_factor=math.sqrt(2), upcast_softmax=True,
    ).double()  # fmt: skip
    perturbed(theirs), perturbed(attend)
    names = {"norm_1": "norm1", "conv_1": "conv1", "project": "time_emb_proj", "norm_2": "norm2", "conv_2": "conv2"}
    layers = {ours_: getattr(theirs, theirs_) for ours_, theirs_ in names.items()}
    layers |= {"attention.norm": attend.group_norm, "attention.attention.out": attend.to_out[0]}
    layers |= {"skip": theirs.conv_shortcut} if way != "same" else {}
    state = {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer.named_parameters()}
    for kind in ("weight", "bias"):
        qkv = [getattr(m, kind) for m in (attend.to_q, attend.to_k, attend.to_v)]
        state[f"attention.attention.qkv.{kind}"] = torch.cat(qkv)
    ours.load_state_dict(state, strict=False)
    assert set(state) == {name for name, _ in ours.named_parameters()}
    x, embedding = torch.randn(2, 16, 8, 8).double(), torch.randn(2, 12).double()
    expected = attend(theirs(x, embedding))
    # theirs applies a SiLU to the embedding, ours has it in the embedding
    torch.testing.assert_close(ours(x, nn.functional.silu(embedding)), expected, rtol=1e-9, atol=1e-9)


def dit_weights(reference, channels, patch):
    """The state of diffusers' DiT under our names."""

    def layer(ours, module):
        yield from ((f"{ours}.{name}", p) for name, p in module.named_parameters())

    projection = reference.pos_embed.proj
    yield from (("patch_in.weight", projection.weight.flatten(1)), ("patch_in.bias", projection.bias))
    for i, block in enumerate(reference.transformer_blocks):
        for kind in ("weight", "bias"):
            qkv = [getattr(linear, kind) for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
            yield f"blocks.{i}.attention.qkv.{kind}", torch.cat(qkv)
        yield from layer(f"blocks.{i}.attention.out", block.attn1.to_out[0])
        yield from layer(f"blocks.{i}.mlp.0", block.ff.net[0].proj)
        yield from layer(f"blocks.{i}.mlp.2", block.ff.net[2])
        yield from layer(f"blocks.{i}.modulation", block.norm1.linear)
    yield from layer("modulation", reference.proj_out_1)
    for name, p in reference.proj_out_2.named_parameters():
        # pixels, then channels there; channels, then pixels here
        p = p.unflatten(0, (patch, patch, channels)).permute(2, 0, 1, *range(3, p.ndim + 2)).flatten(0, 2)
        yield f"patch_out.{name}", p


def test_dit_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).double().eval()  # fmt: skip
    perturbed(reference)
    network = DiT(4, 8, 2, width=16, depth=2, heads=2, num_classes=10, out_channels=8).double()
    # each of their blocks has an embedding of its own: all are given one
    embedding = torch.randn(3, 16, dtype=torch.float64)
    for block in reference.transformer_blocks:
        block.norm1.emb.forward = lambda *_, **__: embedding
    network.embedding = Given(nn.functional.silu(embedding))
    network.load_state_dict(dict(dit_weights(reference, 8, 2)))
    network.positions = reference.pos_embed.pos_embed[0].double()
    x, t, label = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 500, 900]), torch.tensor([1, 2, 3])
    expected = reference(x, t, class_labels=label).sample
    torch.testing.assert_close(network(x, torch.zeros(3)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_score_unet_embeds_an_augmentation_and_none_is_zero(name):
    network = perturbed(NETWORKS[name]())
    x, logsnr, label = batch(network)
    plain = network(x, logsnr, label)
    torch.testing.assert_close(network(x, logsnr, label, augment=torch.zeros(3, 5)), plain)
    for k in range(5):
        augment = torch.eye(5)[k].expand(3, 5)
        assert (network(x, logsnr, label, augment=augment) - plain).abs().amax((1, 2, 3)).min() > 1e-4


def test_score_unet_divides_by_sqrt_2_where_paths_meet():
    block = Block(4, 0.0, 8, 8, attention=True)  # both branches are zero at first
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.zeros(2, 4)), x / 2)


def test_fourier_features_tell_neighbouring_pixel_values_apart():
    network = build("vdm_cifar10")
    seen = []
    network.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.unet.forward = lambda x, *_: x[:, :3]
    x = torch.full((1, 3, 2, 2), 100 / 127.5 - 1)
    network(x, torch.zeros(1)), network(x + 1 / 127.5, torch.zeros(1))
    assert seen[0].shape == (1, 15, 2, 2)
    torch.testing.assert_close(seen[0][:, 3:6], torch.sin(2**7 * math.pi * x))
    torch.testing.assert_close(seen[0][:, 12:], torch.cos(2**8 * math.pi * x))
    assert (seen[0] - seen[1])[:, :3].abs().max() < 0.01 < 0.5 < (seen[0] - seen[1])[:, 3:].abs().max()


def test_simple_unet_drops_at_low_resolutions_only():
    network = SimpleUNet(2, 16, 8, [1, 1, 1], [1, 2, 1], [], dropout=0.3, dropout_from=8, groups=4)
    rates = [[block.dropout.p for block in stage] for stage in network.down]
    assert rates == [[0.0], [0.3, 0.3], [0.3]]
    assert [block.dropout.p for block in network.middle] == [0.3, 0.3]


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
        (lambda: score_unet(True)(torch.ones(1, 2, 8, 9), torch.zeros(1)), r"multiples of 2, not \[1, 2, 8, 9\]"),
        (lambda: score_unet(False, attention=[16]), r"resolution 16, but the network has only \[8, 4\]"),
        (lambda: score_unet(False, num_classes=-1), "negative"),
        (
            lambda: NETWORKS["ncsnpp_unlabelled"]()(torch.ones(1, 2, 8, 8), torch.zeros(1), torch.tensor([1])),
            "labels are given",
        ),
        (
            lambda: NETWORKS["ncsnpp_unlabelled"]()(torch.ones(1, 2, 8, 8), torch.zeros(1), augment=torch.zeros(1, 9)),
            "augment_labels=9",
        ),
        (lambda: SimpleUNet(2, 8, 8, [1, 2], [1], groups=4), "has 1 numbers for 2 levels"),
        (lambda: SimpleUNet(2, 8, 8, [1, 2], [1, 1], heads=3, groups=4), "3 heads do not divide"),
        (lambda: NETWORKS["simple"]()(torch.ones(1, 3, 8, 8), torch.zeros(1)), r"\[B, 2, H, W\]"),
        (lambda: NETWORKS["dit"]()(torch.ones(1, 2, 16, 16), torch.zeros(1)), r"\[B, 2, 8, 8\], not \[1, 2, 16, 16\]"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(DiffxError, match=message):
        mistake()
