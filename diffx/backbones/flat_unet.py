r"""VDM's network, which never changes the resolution.

Kingma et al., *Variational Diffusion Models*, arXiv 2107.00630, appendix B: DDPM's U-Net with one level only, far more
blocks, attention in the middle, and Fourier features sin(2ⁿ·π·z), cos(2ⁿ·π·z) of the input beside the input, which tell
neighbouring pixel values apart: most bits of an image are in its last digits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffx.backbones.base import Backbone
from diffx.backbones.unet import UNet


class FlatUNet(Backbone):
    """A U-Net of one level over the input and its Fourier features; what it gives is added to the input.

    Arguments:
        in_channels: the channels of the input.
        image_size: height and width of the input, in pixels; other sizes are computed too.
        base: the channels of all layers.
        blocks: the residual blocks on the way down (on the way up one more).
        exponents: the n of the Fourier features.
        dropout: the probability of dropping an activation, within residual blocks.
        groups: the number of groups of the group normalisations.
        num_classes: the number of classes without the null class; 0 for a network without labels.
        out_channels: the channels of the output; `in_channels` by default. The input is added to the first of them.

    Raises:
        DiffxError: if channels do not divide into groups.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        base: int = 128,
        blocks: int = 32,
        exponents: Sequence[int] = (7, 8),
        dropout: float = 0.1,
        groups: int = 32,
        num_classes: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.exponents = tuple(exponents)
        self.unet = UNet(
            in_channels * (1 + 2 * len(self.exponents)),
            image_size,
            base,
            [1],
            blocks,
            scale_shift=False,
            dropout=dropout,
            groups=groups,
            num_classes=num_classes,
            out_channels=self.out_channels,
        )
        self.parts = self.unet.parts

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Applies the network; see `Backbone.forward`. Height and width may be any."""
        # in float32 or better: half precision cannot tell neighbouring pixel values apart
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        phases = torch.cat([2.0**n * math.pi * wide for n in self.exponents], dim=1)
        features = torch.cat([wide, phases.sin(), phases.cos()], dim=1).to(x.dtype)
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels)) + self.unet(features, logsnr, label)
