r"""The U-Net of simple diffusion, which does most of its work at low resolutions.

Hoogeboom, Heek and Salimans, *simple diffusion: End-to-end diffusion for high resolution images*, arXiv 2301.11093,
section 3 and appendix B: each level has its own number of blocks, most of them at 16×16; drop-out acts at low
resolutions only; resolutions change between blocks, by averaging and repeating pixels; a skip connection joins each
block of the way up with its mirror image on the way down, as (norm(x) + norm(skip))/√2 at the start of the block, so
that the blocks of a level are all of the same width.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from diffx.backbones.base import Backbone
from diffx.backbones.unet import Attention, ScaleShiftNorm, check_channels, resolutions
from diffx.nn import ConditionEmbedding, zeros
from diffx.utils import DiffxError


class SimpleUNet(Backbone):
    """A U-Net whose levels differ in their number of blocks (arXiv 2301.11093).

    Arguments:
        in_channels: the channels of the input.
        image_size: height and width of the input, in pixels; it says at which level a resolution is reached.
        base: the channels at full resolution, before multiplication.
        mult: the multiple of `base` at each level; each level halves the resolution of the one before.
        blocks: the residual blocks of each level, on the way down and again on the way up.
        attention: the resolutions with attention, in pixels; the middle of the network has it always.
        heads: the number of attention heads.
        embedding: the width of the embedding of noise level and class.
        dropout: the probability of dropping an activation, within residual blocks.
        dropout_from: the largest resolution with drop-out, in pixels.
        groups: the number of groups of the group normalisations.
        num_classes: the number of classes without the null class; 0 for a network without labels.
        out_channels: the channels of the output; `in_channels` by default.

    Raises:
        DiffxError: if there is not one number of blocks for each level, the image cannot be halved often enough, a
            resolution for attention does not occur, or channels do not divide into groups or heads.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        base: int,
        mult: Sequence[float],
        blocks: Sequence[int],
        attention: Sequence[int] = (),
        heads: int = 4,
        embedding: int = 1024,
        dropout: float = 0.0,
        dropout_from: int = 16,
        groups: int = 32,
        num_classes: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = [int(base * m) for m in mult]
        sizes = resolutions(image_size, len(widths), attention)
        if len(blocks) != len(widths):
            raise DiffxError(
                f"backbone.blocks has {len(blocks)} numbers for {len(widths)} levels in backbone.mult; give one each"
            )
        check_channels(widths, groups, heads, None)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.image_size = image_size
        self.multiple = 2 ** (len(widths) - 1)
        self.embedding = ConditionEmbedding(base, embedding, num_classes)
        norm = partial(nn.GroupNorm, groups)

        def block(level: int, attend: bool = False, joins: bool = False) -> Block:
            probability = dropout if sizes[level] <= dropout_from else 0.0
            after = Attention(norm, widths[level], heads) if attend else None
            return Block(norm, embedding, probability, widths[level], after, joins)

        def stage(level: int, joins: bool) -> nn.ModuleList:
            return nn.ModuleList(block(level, sizes[level] in attention, joins) for _ in range(blocks[level]))

        levels = range(len(widths))
        steps = list(itertools.pairwise(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(stage(level, joins=False) for level in levels)
        self.shrink = nn.ModuleList(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(a, b, 1)) for a, b in steps)
        self.middle = nn.ModuleList([block(levels[-1], attend=True), block(levels[-1])])
        self.up = nn.ModuleList(stage(level, joins=True) for level in levels)
        self.grow = nn.ModuleList(nn.Sequential(nn.Conv2d(b, a, 1), nn.Upsample(scale_factor=2.0)) for a, b in steps)
        self.norm_out = norm(widths[0])
        self.conv_out = zeros(nn.Conv2d(widths[0], self.out_channels, 3, padding=1))
        self.parts = tuple(module for module in self.modules() if isinstance(module, Block))

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Applies the network; see `Backbone.forward`. Height and width may be any multiple of 2^(levels - 1)."""
        if x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise DiffxError(
                f"the network takes inputs of shape [B, {self.in_channels}, H, W] with H and W multiples of "
                f"{self.multiple}, not {list(x.shape)}; set backbone.in_channels to the data's, or resize the images"
            )
        embedding = self.embedding(logsnr, label)
        x, skips = self.conv_in(x), []
        for level, stage in enumerate(self.down):
            x = self.shrink[level - 1](x) if level > 0 else x
            for block in cast("nn.ModuleList", stage):
                x = block(x, embedding)
                skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level in reversed(range(len(self.up))):
            for block in cast("nn.ModuleList", self.up[level]):
                x = block(x, embedding, skips.pop())
            x = self.grow[level - 1](x) if level > 0 else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Block(nn.Module):
    """Two convolutions beside the identity, the second one conditioned and zero at first, then attention if asked for.

    Arguments:
        norm: makes a normalisation for a number of channels.
        embedding_channels: the width D of the embedding.
        dropout: the probability of dropping an activation before the second convolution.
        channels: the channels of input, output and skip connection.
        attention: what follows.
        joins: whether a skip connection from the way down comes in.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        embedding_channels: int,
        dropout: float,
        channels: int,
        attention: nn.Module | None,
        joins: bool,
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.norm_skip = norm(channels) if joins else None
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = ScaleShiftNorm(norm, embedding_channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeros(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """Applies the block to x and, where it joins, the skip connection, both `[B, C, H, W]`; embedding `[B, D]`."""
        h = self.norm(x)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip)) * math.sqrt(0.5)
        h = self.conv_1(F.silu(h))
        x = x + self.conv_2(self.dropout(F.silu(self.condition(h, embedding))))
        return x if self.attention is None else self.attention(x, embedding)
