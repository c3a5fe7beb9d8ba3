r"""Embeddings of what a network is told beside its input: the noise level, the class, the position.

The noise level is the logSNR, log(α²/σ²), so that a trained network can be used with any schedule. It lies within ±40
or so, most of the mass within ±15, and what a denoiser does changes on a scale of about one. Its sinusoids have
wavelengths from 1 to 160, spaced geometrically: the longest is twice the range, so that no two levels look alike, and
the shortest tells apart levels a few hundredths from each other without making the network rough between them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.utils import DiffxError

_SHORTEST = 1.0
_LONGEST = 160.0


def sinusoids(x: Tensor, features: int, shortest: float = _SHORTEST, longest: float = _LONGEST) -> Tensor:
    """Cosines and sines of a number, their wavelengths spaced geometrically.

    Arguments:
        x: the numbers, shape `[B]`.
        features: how many features to make; even, half of them cosines.
        shortest: the shortest wavelength, in the unit of `x`.
        longest: the longest wavelength, in the unit of `x`.

    Returns:
        The features in [-1, 1], shape `[B, features]`; float32, or float64 where `x` is.
    """
    # computed here and not kept in a buffer, which module.bfloat16() would round
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    exponent = torch.linspace(
        math.log(1 / longest), math.log(1 / shortest), features // 2, device=x.device, dtype=x.dtype
    )
    phase = x[:, None] * exponent.exp().mul(2 * math.pi)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def sincos_positions(grid: int, channels: int) -> Tensor:
    """Fixed embeddings of the positions of a square grid: half of the channels for the row, half for the column.

    The frequencies are those of Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, section 3.5, with 10000
    as the base, as in Peebles and Xie, arXiv 2212.09748.

    Arguments:
        grid: the number of rows and of columns G.
        channels: the number of channels C, a multiple of 4.

    Returns:
        The embeddings in [-1, 1], rows first, shape `[G * G, C]`.
    """
    omega = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([phase.sin(), phase.cos()], dim=-1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


class ConditionEmbedding(nn.Module):
    """One vector for the noise level and the class: sinusoids of the logSNR through an MLP, plus a row per class.

    The last of the `num_classes + 1` rows is the null class of classifier-free guidance (Ho and Salimans,
    *Classifier-Free Diffusion Guidance*, arXiv 2207.12598). A final SiLU, which every layer reading the vector would
    otherwise repeat, is included.

    Arguments:
        features: the number of sinusoids; even.
        channels: the width D of the vector.
        num_classes: the number of classes without the null class; 0 for a network without labels.

    Raises:
        DiffxError: if `features` is odd or `num_classes` negative.
    """

    def __init__(self, features: int, channels: int, num_classes: int) -> None:
        super().__init__()
        if features % 2:
            raise DiffxError(f"the noise level needs an even number of features, not {features}")
        if num_classes < 0:
            raise DiffxError(
                f"num_classes is {num_classes}; give the number of classes, or 0 for a network without labels"
            )
        self.features = features
        self.num_classes = num_classes
        self.level_in = nn.Linear(features, channels)
        self.level_out = nn.Linear(channels, channels)
        self.label = nn.Embedding(num_classes + 1, channels) if num_classes else None

    def forward(self, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Embeds noise level and class.

        Arguments:
            logsnr: the noise levels, shape `[B]`.
            label: the classes, int64 `[B]` in [0, num_classes], where num_classes is the null class; None is the null
                class for all.

        Returns:
            The vectors, shape `[B, D]`.

        Raises:
            DiffxError: if labels are given to a network without labels.
        """
        level = sinusoids(logsnr, self.features).to(self.level_in.weight.dtype)
        embedding = self.level_out(F.silu(self.level_in(level)))
        if self.label is not None:
            embedding = embedding + (self.label.weight[-1] if label is None else self.label(label))
        elif label is not None:
            raise DiffxError(
                "labels are given to a network built without them; "
                "set backbone.num_classes to the number of classes, or conditioning=none"
            )
        return F.silu(embedding)
