"""U-Nets and transformers at equal configuration, in time per floating point operation, and the algebra around them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from configured import backbone
from measure import Case, Clock, long_call
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffx.backbones import speed_up
from diffx.denoisers import Preconditioned
from diffx.objectives import Denoising
from diffx.parameterizations import V
from diffx.schedules import Cosine
from diffx.time_samplers import Stratified
from diffx.utils import Keys
from diffx.weightings import Unit

BATCH = 2
CLASSES = 1000


@dataclass(frozen=True)
class Contender:
    """A network and how it is called and compiled.

    Arguments:
        network: its weights.
        call: from the network and an input `[B, C, H, W]` to an output of that shape.
        compile: compiles the network in place.
    """

    network: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]
    compile: Callable[[nn.Module], object]


def cases(quick: bool, clock: Clock) -> list[Case]:
    """Forward alone, then forward and backward, of each network; then the denoiser algebra."""
    found = []
    for name, x, contenders in (
        ("U-Net", images(3), unets(quick, attention=False)),
        ("U-Net, attention at 16×16", images(3), unets(quick, attention=True)),
        ("DiT-S/2", images(4), transformers(quick)),
    ):
        # of the peers the reference alone: compiling a U-Net takes a minute or two
        pair = [who for who in contenders if who.startswith(("diffusers", "diffx"))]
        contenders |= {f"{who}, compiled": compiled(contenders[who]) for who in pair}
        for backward in (False, True):
            title = f"{name} {list(x.shape)}, {'forward and backward' if backward else 'forward'}"
            found.append(_case(title, x, contenders, backward, 1 if quick else 5, clock))
    return [*found, *(_algebra(fast, quick, clock) for fast in (False, True))]


def images(channels: int) -> Tensor:
    return torch.randn(BATCH, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def compiled(contender: Contender) -> Contender:
    """A copy that is compiled when it is first called."""
    network = copy.deepcopy(contender.network)
    contender.compile(network)
    return replace(contender, network=network)


def _case(title: str, x: Tensor, contenders: dict[str, Contender], backward: bool, rounds: int, clock: Clock) -> Case:
    timed, extra = {}, {}
    for who, contender in contenders.items():
        function = partial(work, contender, x, backward)
        with torch.compiler.set_stance("force_eager"):
            flops = count(function)
        parameters = sum(parameter.numel() for parameter in contender.network.parameters())
        extra[who] = {"M parameters": parameters / 1e6, "GFLOP": flops / 1e9}
        timed[who] = long_call(clock, function, 1e6 / (flops / 1e9))
    return Case("networks, µs per GFLOP", title, timed, rounds, extra)


def work(contender: Contender, x: Tensor, backward: bool) -> None:
    """A forward pass as in training, which keeps what a backward pass needs, and perhaps that one too."""
    output = contender.call(contender.network, x)
    if backward:
        output.square().mean().backward()
        contender.network.zero_grad()


def count(function: Callable[[], object]) -> int:
    """Floating point operations: matrix products, convolutions and attention, a multiplication and its addition two.

    Attention as the two products that it is, forward, and as four backward, whatever a kernel computes again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---- U-Nets ----


def unets(quick: bool, attention: bool) -> dict[str, Contender]:
    """configs/backbone/ddpm_cifar10.yaml without drop-out, and the peers as near to it as their constructors allow."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    base, mult, blocks = (32, [1, 2], 1) if quick else (128, [1, 2, 2, 2], 2)
    changes: dict[str, Any] = {"base": base, "mult": mult, "blocks": blocks, "attention": [16] if attention else []}
    # the second level has 16×16 pixels
    kinds = ["Attn" if attention and level == 1 else "" for level in range(len(mult))]
    step = torch.full((BATCH,), 500)
    logsnr = torch.zeros(BATCH)
    contenders = {
        "diffusers UNet2DModel": Contender(
            UNet2DModel(
                32, 3, 3, layers_per_block=blocks, block_out_channels=tuple(base * m for m in mult),
                down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
                up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
                attention_head_dim=None, norm_num_groups=32, norm_eps=1e-5,
            ),
            lambda network, x: network(x, step, return_dict=False)[0],
            nn.Module.compile,
        ),
        "diffx": Contender(
            backbone("ddpm_cifar10", 3, 32, 0, dropout=0.0, **changes),
            lambda network, x: network(x, logsnr),
            lambda network: speed_up(network, compile=True),
        ),
    }  # fmt: skip
    if attention and find_spec("denoising_diffusion_pytorch") is not None:
        from denoising_diffusion_pytorch import Unet

        # two residual blocks a level always; attention at every level, linear but for the last, cannot be left out
        unet = Unet(base, dim_mults=tuple(mult), flash_attn=True)
        contenders["lucidrains Unet"] = Contender(unet, lambda network, x: network(x, step), nn.Module.compile)
    if not attention and find_spec("azula") is not None:
        from azula.nn.unet import UNet

        # no attention anywhere; one residual block less on the way up
        unet = UNet(
            3, 3, hid_channels=[base * m for m in mult], hid_blocks=[blocks] * len(mult), mod_features=4 * base,
            norm="group", groups=32,
        )  # fmt: skip
        vector = torch.randn(BATCH, 4 * base)
        contenders["azula UNet"] = Contender(unet, lambda network, x: network(x, vector), nn.Module.compile)
    return contenders


# ---- transformers ----


def transformers(quick: bool) -> dict[str, Contender]:
    """configs/backbone/dit_s_2.yaml, and the peers as near to it as their constructors allow."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    width, depth, heads = (32, 1, 2) if quick else (384, 12, 6)
    step, label, logsnr = torch.full((BATCH,), 500), torch.arange(BATCH), torch.zeros(BATCH)
    contenders = {
        "diffusers DiTTransformer2DModel": Contender(
            DiTTransformer2DModel(
                heads, width // heads, 4, 4, depth, sample_size=32, patch_size=2, num_embeds_ada_norm=CLASSES
            ),
            lambda network, x: network(x, step, label, return_dict=False)[0],
            lambda network: _compile_each(network.transformer_blocks),
        ),
        "diffx": Contender(
            backbone("dit_s_2", 4, 32, CLASSES, width=width, depth=depth, heads=heads),
            lambda network, x: network(x, logsnr, label),
            lambda network: speed_up(network, compile=True),
        ),
    }
    if find_spec("azula") is not None:
        from azula.nn.dit import DiT

        dit = DiT(
            16, 16, mod_features=width, hid_channels=width, hid_blocks=depth, attention_heads=heads, qk_norm=False
        )
        vector = torch.randn(BATCH, width)

        def call(network: nn.Module, x: Tensor) -> Tensor:
            tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
            return F.pixel_shuffle(network(tokens, vector).transpose(1, 2).unflatten(2, (16, 16)), 2)

        contenders["azula DiT"] = Contender(dit, call, lambda network: _compile_each(network.blocks))
    return contenders


def _compile_each(blocks: Any) -> None:
    """The repeated blocks one by one, as diffusers' compile_repeated_blocks does: they share what is compiled."""
    for block in blocks:
        block.compile(fullgraph=True)


# ---- the algebra around a network ----


class Given(Keys):
    """Random numbers that are drawn already."""

    def __init__(self, index: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(0, index)
        self.noise, self.times = torch.randn(len(index), *shape), torch.rand(len(index))

    def normal(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.noise

    def uniform(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.times


class Nothing(nn.Module):
    """A network that does next to nothing, so that what is around it is seen alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        return x * self.weight


def _algebra(fast: bool, quick: bool, clock: Clock) -> Case:
    changes = {"width": 32, "depth": 1, "heads": 2} if quick else {}
    network, x, label = backbone("dit_s_2", 4, 32, CLASSES, **changes), images(4), torch.arange(BATCH)
    if fast:
        speed_up(network, compile=True)
    objective, index = Denoising(Stratified(), Unit()), torch.arange(BATCH)
    given, logsnr = Given(index, tuple(x.shape[1:])), torch.zeros(BATCH)
    full, empty = (Preconditioned(inner, Cosine(), V()) for inner in (network, Nothing()))

    def alone() -> None:
        network(x, logsnr, label).square().mean().backward()
        network.zero_grad()

    def through(denoiser: Preconditioned, keys: Callable[[], Keys]) -> Callable[[], None]:
        def step() -> None:
            objective(denoiser, x, keys(), label=label)["loss"].mean().backward()
            denoiser.zero_grad()

        return step

    contenders = {
        "the backbone alone": alone,
        "denoiser and loss": through(full, lambda: given),
        "… and keyed noise and times": through(full, lambda: Keys(0, index, total=BATCH)),
        "denoiser and loss around nothing": through(empty, lambda: given),
        "… and keyed noise and times, around nothing": through(empty, lambda: Keys(0, index, total=BATCH)),
    }
    title = f"DiT-S/2 {list(x.shape)}, forward and backward, {'compiled' if fast else 'eager'}"
    timed = {name: long_call(clock, function) for name, function in contenders.items()}
    return Case("denoiser algebra, µs per step", title, timed, 1 if quick else 7)
