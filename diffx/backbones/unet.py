r"""The U-Nets of DDPM and ADM, and what lies between.

Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, appendix B: the embedding is added
after the first convolution of a block, resolutions change by strided convolution and by nearest neighbours and a
convolution, attention has one head. Dhariwal and Nichol, *Diffusion Models Beat GANs on Image Synthesis*, arXiv
2105.05233, section 3: the embedding scales and shifts the second normalisation (adaptive group normalisation),
resolutions change within residual blocks (as in BigGAN), attention has several heads at several resolutions.

All layers take `(x, embedding)`, so that any sequence of them is a stage. The output of every stage on the way down is
kept, and concatenated to the input of the stage that mirrors it on the way up.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.backbones.base import Backbone
from diffx.nn import ConditionEmbedding, SelfAttention, zeros
from diffx.utils import DiffxError


class UNet(Backbone):
    """A convolutional U-Net with attention at chosen resolutions (arXiv 2006.11239, arXiv 2105.05233).

    Arguments:
        in_channels: the channels of the input.
        image_size: height and width of the input, in pixels; it says at which level a resolution is reached. Other
            sizes that can be halved as often are computed too, with attention at the same levels.
        base: the channels at full resolution, before multiplication.
        mult: the multiple of `base` at each level; each level halves the resolution of the one before.
        blocks: the residual blocks per level (on the way up one more).
        attention: the resolutions with attention, in pixels; the middle of the network has it always.
        heads: the number of attention heads; 1 by default.
        head_channels: the channels per attention head, instead of `heads`.
        scale_shift: whether the embedding scales and shifts the normalisation (ADM) or is added before it (DDPM).
        resblock_updown: whether resolutions change within residual blocks (ADM) or by convolutions (DDPM).
        dropout: the probability of dropping an activation, within residual blocks.
        groups: the number of groups of the group normalisations.
        num_classes: the number of classes without the null class; 0 for a network without labels.
        out_channels: the channels of the output; `in_channels` by default.

    Raises:
        DiffxError: if the image cannot be halved often enough, a resolution for attention does not occur, or channels
            do not divide into groups or heads.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        base: int,
        mult: Sequence[float],
        blocks: int,
        attention: Sequence[int] = (),
        heads: int | None = None,
        head_channels: int | None = None,
        scale_shift: bool = True,
        resblock_updown: bool = True,
        dropout: float = 0.0,
        groups: int = 32,
        num_classes: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = [int(base * m) for m in mult]
        sizes = resolutions(image_size, len(widths), attention)
        check_channels(widths, groups, heads, head_channels)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.image_size = image_size
        self.multiple = 2 ** (len(widths) - 1)
        self.embedding = ConditionEmbedding(base, 4 * base, num_classes)

        norm = partial(nn.GroupNorm, groups)
        condition = partial(ScaleShiftNorm if scale_shift else AdditiveNorm, norm, 4 * base)
        block = partial(ResidualBlock, norm, condition, dropout)

        def layers(old: int, new: int, resolution: int) -> list[nn.Module]:
            return [block(old, new), attend(new)] if resolution in attention else [block(old, new)]

        def attend(width: int) -> nn.Module:
            return Attention(norm, width, width // head_channels if head_channels else heads or 1)

        def down(width: int) -> nn.Module:
            return block(width, width, nn.AvgPool2d(2)) if resblock_updown else ConvDown(width)

        def up(width: int) -> nn.Module:
            return block(width, width, nn.Upsample(scale_factor=2.0)) if resblock_updown else ConvUp(width)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        levels = list(enumerate(zip(sizes, widths, strict=True)))
        width, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for level, (resolution, new) in levels:
            if level > 0:
                self.down.append(Stage([down(width)]))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(Stage(layers(width, new, resolution)))
                skips.append(new)
                width = new
        self.middle = Stage([block(width, width), attend(width), block(width, width)])
        self.up = nn.ModuleList()
        for level, (resolution, new) in reversed(levels):
            for i in range(blocks + 1):
                last = [up(new)] if level > 0 and i == blocks else []
                self.up.append(Stage(layers(width + skips.pop(), new, resolution) + last))
                width = new
        self.norm_out = norm(width)
        self.conv_out = zeros(nn.Conv2d(width, self.out_channels, 3, padding=1))
        self.parts = (*self.down, self.middle, *self.up)

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Applies the network; see `Backbone.forward`. Height and width may be any multiple of 2^(levels - 1)."""
        if x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise DiffxError(
                f"the network takes inputs of shape [B, {self.in_channels}, H, W] with H and W multiples of "
                f"{self.multiple}, not {list(x.shape)}; set backbone.in_channels to the data's, or resize the images"
            )
        embedding = self.embedding(logsnr, label)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(x)))


class Stage(nn.ModuleList):
    """Layers in sequence."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Applies the layers to x `[B, C, H, W]`, each knowing the embedding `[B, D]`."""
        for layer in self:
            x = layer(x, embedding)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection, the second one conditioned and zero at first.

    Arguments:
        norm: makes a normalisation for a number of channels.
        condition: makes a conditioned normalisation for a number of channels.
        dropout: the probability of dropping an activation before the second convolution.
        in_channels: the channels of the input.
        out_channels: the channels of the output.
        resample: changes the resolution, before the first convolution and on the skip connection alike.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        condition: Callable[[int], nn.Module],
        dropout: float,
        in_channels: int,
        out_channels: int,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm(in_channels)
        self.resample = resample or nn.Identity()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = condition(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeros(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Applies the block to x `[B, C, H, W]`, knowing the embedding `[B, D]`."""
        h = self.conv_1(self.resample(F.silu(self.norm(x))))
        h = self.conv_2(self.dropout(F.silu(self.condition(h, embedding))))
        return self.skip(self.resample(x)) + h


class ScaleShiftNorm(nn.Module):
    """norm(h) · (1 + scale) + shift, both linear in the embedding (ADM's adaptive group normalisation, equation 5)."""

    def __init__(self, norm: Callable[[int], nn.Module], embedding_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.project = nn.Linear(embedding_channels, 2 * channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Normalises h `[B, C, H, W]`, knowing the embedding `[B, D]`."""
        scale, shift = self.project(embedding)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(h), 1 + scale)


class AdditiveNorm(nn.Module):
    """norm(h + shift), the shift linear in the embedding (DDPM)."""

    def __init__(self, norm: Callable[[int], nn.Module], embedding_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.project = nn.Linear(embedding_channels, channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Normalises h `[B, C, H, W]`, knowing the embedding `[B, D]`."""
        return self.norm(h + self.project(embedding)[:, :, None, None])


class Attention(nn.Module):
    """Self-attention over the pixels, beside a skip connection; zero at first."""

    def __init__(self, norm: Callable[[int], nn.Module], channels: int, heads: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.attention = SelfAttention(channels, heads)
        zeros(self.attention.out)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """Applies attention to x `[B, C, H, W]`."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class ConvDown(nn.Module):
    """Halves the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """From `[B, C, H, W]` to `[B, C, H / 2, W / 2]`."""
        return self.conv(x)


class ConvUp(nn.Module):
    """Doubles the resolution by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """From `[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


def resolutions(image_size: int, levels: int, attention: Sequence[int]) -> list[int]:
    """The resolution of each level of a U-Net, the first that of the image.

    Arguments:
        image_size: height and width of the image.
        levels: the number of levels.
        attention: the resolutions at which attention is asked for.

    Raises:
        DiffxError: if the image cannot be halved often enough, or a resolution for attention does not occur.
    """
    if levels < 1:
        raise DiffxError("backbone.mult is empty; give at least one level, such as [1, 2]")
    multiple = 2 ** (levels - 1)
    if image_size % multiple:
        raise DiffxError(
            f"an image of {image_size} cannot be halved {levels - 1} times; "
            f"image_size must be a multiple of {multiple}, or give fewer levels in backbone.mult"
        )
    sizes = [image_size // 2**level for level in range(levels)]
    if missing := sorted(set(attention) - set(sizes)):
        raise DiffxError(
            f"attention is asked for at resolution {missing[0]}, but the network has only {sizes}; "
            "choose backbone.attention among these"
        )
    return sizes


def check_channels(widths: list[int], groups: int, heads: int | None, head_channels: int | None) -> None:
    """Raises `DiffxError` if the widths do not divide into groups and heads, or heads are given in two ways."""
    if heads and head_channels:
        raise DiffxError("heads and head_channels are both given; set one of them to null, it follows from the other")
    for divisor, what in ((groups, "groups"), (head_channels or 1, "head_channels")):
        if divisor < 1 or any(width % divisor for width in widths):
            raise DiffxError(
                f"{what} is {divisor}, which does not divide all of the widths {widths}; "
                f"choose a divisor of {math.gcd(*widths)}"
            )
