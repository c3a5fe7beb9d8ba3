r"""The U-Nets of Score SDE, DDPM++ and NCSN++, with the settings that EDM gave them.

Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*, arXiv 2011.13456, appendix H;
Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, arXiv 2206.00364, appendix F and
table 8. Against DDPM's network: resolutions change within residual blocks, whose skip connection then has a
convolution; every sum with a skip connection is divided by √2; on the way up attention follows the last block of a
level only. NCSN++ changes resolutions by the binomial filter [1, 3, 3, 1], adds a pyramid of the input to the way down
and embeds the noise level by random frequencies.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.backbones.base import Backbone
from diffx.backbones.unet import resolutions
from diffx.nn import SelfAttention, xavier, zeros
from diffx.utils import DiffxError

_EPS = 1e-6
_HALF = math.sqrt(0.5)


class ScoreUNet(Backbone):
    """DDPM++ or, with all three switches, NCSN++ (arXiv 2011.13456, arXiv 2206.00364).

    Arguments:
        in_channels: the channels of the input.
        image_size: height and width of the input, in pixels; it says at which level a resolution is reached.
        base: the channels at full resolution, before multiplication.
        mult: the multiple of `base` at each level; each level halves the resolution of the one before.
        blocks: the residual blocks per level (on the way up one more).
        attention: the resolutions with attention, in pixels; the middle of the network has it always.
        fir: whether resolutions change by the filter [1, 3, 3, 1] instead of averaging and repeating pixels.
        pyramid: whether the input, halved again and again by convolutions, is added on the way down.
        fourier: whether the noise level is embedded by frequencies of a normal law, twice as many as otherwise.
        dropout: the probability of dropping an activation, within residual blocks.
        num_classes: the number of classes without the null class; 0 for a network without labels.
        augment_labels: the number of labels of an augmentation; 0 for none.
        out_channels: the channels of the output; `in_channels` by default.

    Raises:
        DiffxError: if the image cannot be halved often enough, or a resolution for attention does not occur.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        base: int,
        mult: Sequence[float],
        blocks: int,
        attention: Sequence[int] = (),
        fir: bool = False,
        pyramid: bool = False,
        fourier: bool = False,
        dropout: float = 0.0,
        num_classes: int = 0,
        augment_labels: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = [int(base * m) for m in mult]
        sizes = resolutions(image_size, len(widths), attention)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.image_size = image_size
        self.multiple = 2 ** (len(widths) - 1)
        self.augment_labels = augment_labels
        self.embedding = Embedding(2 * base if fourier else base, 4 * base, fourier, num_classes, augment_labels)
        block = partial(Block, 4 * base, dropout)
        halve, double = (FIRDown, FIRUp) if fir else (partial(nn.AvgPool2d, 2), partial(nn.Upsample, scale_factor=2.0))

        self.conv_in = _conv(in_channels, base)
        width, of_pyramid, skips = base, in_channels, [base]
        self.down = nn.ModuleList()
        for level, (size, new) in enumerate(zip(sizes, widths, strict=True)):
            resample = block(width, width, resample=halve()) if level > 0 else None
            fold = _halving_conv(of_pyramid, width, fir) if level > 0 and pyramid else None
            skips += [width] * (level > 0)
            of_pyramid = width if level > 0 else in_channels
            layers = [block(width if i == 0 else new, new, attention=size in attention) for i in range(blocks)]
            self.down.append(Down(resample, fold, layers))
            skips += [new] * blocks
            width = new
        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            resample = block(width, width, resample=double()) if level < len(widths) - 1 else None
            layers = []
            for i in range(blocks + 1):
                last = i == blocks and sizes[level] in attention
                layers.append(block(width + skips.pop(), widths[level], attention=last))
                width = widths[level]
            self.up.append(Up(resample, layers))
        self.norm_out = _norm(width)
        self.conv_out = zeros(nn.Conv2d(width, self.out_channels, 3, padding=1))
        self.parts = tuple(module for module in self.modules() if isinstance(module, Block))

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Applies the network; see `Backbone.forward`. Height and width may be any multiple of 2^(levels - 1).

        Arguments:
            x: the input, `[B, C, H, W]`.
            logsnr: the noise levels, `[B]`.
            label: the classes, int64 `[B]`.
            augment: the labels of an augmentation, `[B, augment_labels]`; None is zero for all, as in sampling.
        """
        if x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise DiffxError(
                f"the network takes inputs of shape [B, {self.in_channels}, H, W] with H and W multiples of "
                f"{self.multiple}, not {list(x.shape)}; set backbone.in_channels to the data's, or resize the images"
            )
        embedding = self.embedding(logsnr, label, augment)
        pyramid, x = x, self.conv_in(x)
        skips = [x]
        for level in self.down:
            x, pyramid = level(x, pyramid, skips, embedding)
        for block in self.middle:
            x = block(x, embedding)
        for level in self.up:
            x = level(x, skips, embedding)
        return self.conv_out(F.silu(self.norm_out(x)))


class Down(nn.Module):
    """A level of the way down: a change of resolution but for the first level, then blocks."""

    def __init__(self, resample: nn.Module | None, fold: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resample = resample
        self.fold = fold
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, pyramid: Tensor, skips: list[Tensor], embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the level to x and the pyramid of the input, and puts what the way up needs to the skips."""
        if self.resample is not None:
            x = self.resample(x, embedding)
            if self.fold is not None:
                x = pyramid = (x + self.fold(pyramid)) * _HALF
            skips.append(x)
        for block in self.blocks:
            x = block(x, embedding)
            skips.append(x)
        return x, pyramid


class Up(nn.Module):
    """A level of the way up: a change of resolution but for the first level, then blocks with skip connections."""

    def __init__(self, resample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resample = resample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Applies the level, and takes what it needs from the end of the skips."""
        if self.resample is not None:
            x = self.resample(x, embedding)
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return x


class Block(nn.Module):
    """Two convolutions beside a skip connection, then attention if asked for; every sum is divided by √2.

    Arguments:
        embedding_channels: the width D of the embedding.
        dropout: the probability of dropping an activation before the second convolution.
        in_channels: the channels of the input.
        out_channels: the channels of the output.
        resample: changes the resolution, before the first convolution and on the skip connection alike.
        attention: whether attention of one head follows.
    """

    def __init__(
        self,
        embedding_channels: int,
        dropout: float,
        in_channels: int,
        out_channels: int,
        resample: nn.Module | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm_1 = _norm(in_channels)
        self.resample = resample or nn.Identity()
        self.conv_1 = _conv(in_channels, out_channels)
        self.project = xavier(nn.Linear(embedding_channels, out_channels))
        self.norm_2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeros(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels and resample is None
        self.skip = nn.Identity() if same else xavier(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Applies the block to x `[B, C, H, W]`, knowing the embedding `[B, D]`."""
        h = self.conv_1(self.resample(F.silu(self.norm_1(x))))
        h = F.silu(self.norm_2(h + self.project(embedding)[:, :, None, None]))
        h = self.conv_2(self.dropout(h))
        return self.attention((self.skip(self.resample(x)) + h) * _HALF)


class Attention(nn.Module):
    """Self-attention of one head over the pixels, beside a skip connection, the sum divided by √2; zero at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.attention = SelfAttention(channels, 1)
        xavier(self.attention.qkv, math.sqrt(0.2))
        zeros(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        """Applies attention to x `[B, C, H, W]`."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return (x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])) * _HALF


class Embedding(nn.Module):
    """One vector for noise level, class and augmentation, all summed before an MLP with a SiLU at its end.

    The noise level is EDM's c_noise = ¼·ln σ = −logSNR/8 (arXiv 2206.00364, table 1). DDPM++ takes frequencies from 1
    down to 10⁻⁴, NCSN++ 2π times the absolute values of numbers from N(0, 16²). These are random there; here they are
    that law's quantiles, so that nothing has to be drawn or kept.

    Arguments:
        features: the number of sines and cosines; even.
        channels: the width D of the vector.
        fourier: which of the two sets of frequencies.
        num_classes: the number of classes without the null class, which is the zero vector; 0 for none.
        augment_labels: the number of labels of an augmentation; 0 for none.
    """

    def __init__(self, features: int, channels: int, fourier: bool, num_classes: int, augment_labels: int) -> None:
        super().__init__()
        if num_classes < 0 or augment_labels < 0:
            raise DiffxError("backbone.num_classes or augment_labels is negative; give a number, or 0 for none")
        self.features = features
        self.fourier = fourier
        self.num_classes = num_classes
        self.augment_labels = augment_labels
        self.label = xavier(nn.Linear(num_classes, features)) if num_classes else None
        self.augment = xavier(nn.Linear(augment_labels, features, bias=False)) if augment_labels else None
        self.level_in = xavier(nn.Linear(features, channels))
        self.level_out = xavier(nn.Linear(channels, channels))

    def forward(self, logsnr: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Embeds noise levels `[B]`, classes int64 `[B]` and labels of an augmentation `[B, …]` as vectors `[B, D]`.

        Raises:
            DiffxError: if labels are given to a network without them.
        """
        dtype = self.level_in.weight.dtype
        embedding = self._level(logsnr).to(dtype)
        if self.label is not None:
            embedding = embedding + self.label(self._one_hot(logsnr, label).to(dtype))
        elif label is not None:
            raise DiffxError(
                "labels are given to a network built without them; "
                "set backbone.num_classes to the number of classes, or conditioning=none"
            )
        if self.augment is not None:
            # zeros go through the layer too, so that it has a gradient whatever is given
            none = logsnr.new_zeros(len(logsnr), self.augment_labels)
            embedding = embedding + self.augment((none if augment is None else augment).to(dtype))
        elif augment is not None:
            raise DiffxError(
                "an augmentation's labels are given to a network built without them; "
                f"set backbone.augment_labels={augment.shape[1]}, or augmentation=none"
            )
        return F.silu(self.level_out(F.silu(self.level_in(embedding))))

    def _level(self, logsnr: Tensor) -> Tensor:
        # computed here and not kept in a buffer, which module.bfloat16() would round
        c_noise = -logsnr.to(torch.promote_types(logsnr.dtype, torch.float32)) / 8
        half = self.features // 2
        k = torch.arange(half, device=logsnr.device, dtype=torch.float64)
        if self.fourier:
            frequency = 2 * math.pi * 16 * torch.special.ndtri(0.5 + (k + 0.5) / (2 * half))
        else:
            frequency = 10000.0 ** -(k / (half - 1))
        phase = c_noise[:, None] * frequency.to(c_noise.dtype)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def _one_hot(self, logsnr: Tensor, label: Tensor | None) -> Tensor:
        """√K·one-hot, `[B, K]`; zero for the null class."""
        if label is None:
            return logsnr.new_zeros(len(logsnr), self.num_classes)
        return (label[:, None] == torch.arange(self.num_classes, device=label.device)) * math.sqrt(self.num_classes)


class FIRDown(nn.Module):
    """Halves the resolution by the binomial filter [1, 3, 3, 1]/8 in both directions, with zeros beyond the border."""

    taps: Tensor

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("taps", _binomial(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From `[B, C, H, W]` to `[B, C, H / 2, W / 2]`, with the padding of 1."""
        return F.conv2d(x, _per_channel(self.taps, x), stride=2, padding=self.padding, groups=x.shape[1])


class FIRUp(nn.Module):
    """Doubles the resolution: zeros between the pixels, then the binomial filter [1, 3, 3, 1]/4 in both directions."""

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", 4 * _binomial(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From `[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        return F.conv_transpose2d(x, _per_channel(self.taps, x), stride=2, padding=1, groups=x.shape[1])


def _binomial() -> Tensor:
    # dividing by powers of two: exact in every floating-point type
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return taps[:, None] * taps


def _per_channel(taps: Tensor, x: Tensor) -> Tensor:
    return taps.to(x.dtype).expand(x.shape[1], 1, *taps.shape)


def _halving_conv(in_channels: int, out_channels: int, fir: bool) -> nn.Module:
    """A convolution and the halving of the resolution in one: the border of zeros lies around both."""
    return nn.Sequential(
        xavier(nn.Conv2d(in_channels, out_channels, 3, padding=2 if fir else 1)), FIRDown(0) if fir else nn.AvgPool2d(2)
    )


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return xavier(nn.Conv2d(in_channels, out_channels, 3, padding=1))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, max(channels // 4, 1)), channels, eps=_EPS)
