r"""EDM's augmentation: flips and affine maps, which the network is told.

Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, arXiv 2206.00364, appendix F.2 and
table 6; the way images are resampled is that of *Training Generative Adversarial Networks with Limited Data*, arXiv
2006.06676, appendix B: twofold upsampling by a wavelet filter, bilinear interpolation, downsampling by the same filter.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffx.augmentations.base import Augmentation
from diffx.utils import DiffxError, Keys, expand_as

# Daubechies' least asymmetric wavelet of 6 vanishing moments, "sym6"; as a low-pass filter of gain √2
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_CENTRE = 5  # the tap about which the filter is nearly symmetric
_MARGIN = 3  # pixels at a border whose upsampling lacks neighbours
_SMALLEST = 4


class Geometric(Augmentation):
    r"""Flips, scaling, rotation, stretching and translation, each by a draw of its own.

    With a₀, a₁ ∈ {0, 1}, a₂, a₅, a₆, a₇ ~ N(0, 1) and a₃, a₄ ~ U(−π, π): mirrored left to right where a₀ is 1 and
    upside down where a₁ is; scaled by 2^(s·a₂); rotated by −a₃; stretched by 2^(r·a₅) along the direction −a₄ and
    squeezed as much across it; shifted by τ·a₆ of its width and τ·a₇ of its height. The network is told (a₀, a₁, a₂,
    cos a₃ − 1, sin a₃, a₅·cos a₄, a₅·sin a₄, a₆, a₇), which is zero where nothing was done; as in the paper, (a₄, a₅)
    and (a₄ + π, −a₅), a stretch and a squeeze, are told alike. Beyond its border an image goes on mirrored. Karras et
    al. (arXiv 2206.00364), App. F.2 and Table 6; angles turn from the first axis (to the right) to the second (down).
    Use it when data are few and a network trained on them overfits: the network then needs augment_labels=9, and
    data.flip=false leaves mirroring to this.

    Arguments:
        p: the probability of each operation, in [0, 1]; the numbers of one that is not chosen are zero.
        p_flip: the probability with which a₀ is drawn at all; 1 in EDM, where half of the images are mirrored.
        scale: s, in octaves.
        stretch: r, in octaves.
        translation: τ, in units of the image's side.

    Raises:
        DiffxError: if `p` or `p_flip` is no probability; when called, if samples are no images of 4 pixels or more.
    """

    labels = 9
    filter: Tensor

    def __init__(
        self,
        p: float = 0.12,
        p_flip: float = 1.0,
        scale: float = 0.2,
        stretch: float = 0.2,
        translation: float = 0.125,
    ) -> None:
        super().__init__()
        for name, value in (("p", p), ("p_flip", p_flip)):
            if not 0 <= value <= 1:
                raise DiffxError(f"augmentation.{name} is {value}; set it to a probability, between 0 and 1")
        self.p = p
        self.p_flip = p_flip
        self.scale = scale
        self.stretch = stretch
        self.translation = translation
        self.register_buffer("filter", torch.tensor(_SYM6), persistent=False)

    def forward(self, x: Tensor, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """The augmented images and `augment` `[B, 9]`; see `Augmentation.forward`."""
        if x.ndim != 4 or min(x.shape[2:]) < _SMALLEST:
            raise DiffxError(
                f"augmentation=edm changes images of {_SMALLEST} pixels or more, and these samples have the shape "
                f"{list(x.shape[1:])}; set augmentation=none"
            )
        a = self.draw(keys)
        x = torch.where(expand_as(a[:, 0] == 1, x), x.flip(3), x)
        x = torch.where(expand_as(a[:, 1] == 1, x), x.flip(2), x)
        with torch.autocast(x.device.type, enabled=False):  # images keep their digits
            moved = warp(x, self.origins(a, *x.shape[2:]), self.filter)
        x = torch.where(expand_as((a[:, 2:] != 0).any(1), x), moved, x)
        return x, {"augment": told(a).to(x.dtype)}

    def draw(self, keys: Keys) -> Tensor:
        """a₀ … a₇, zero where not chosen, float64 `[B, 8]`."""
        probability = torch.tensor([self.p_flip, *[self.p] * 5], device=keys.index.device)
        chosen = keys.uniform("augment/chosen", 6) < probability
        mirrored = keys.uniform("augment/mirrored", 2, dtype=torch.float64).round()
        normal = keys.normal("augment/normal", 4, dtype=torch.float64)
        angle = (2 * keys.uniform("augment/angle", 2, dtype=torch.float64) - 1) * math.pi
        # stretched along its own axes in half of the cases, as in EDM's code
        turned = keys.uniform("augment/turned") < 0.5
        direction = torch.where(turned, angle[:, 1], 0.0)[:, None]
        a = torch.cat([mirrored, normal[:, :1], angle[:, :1], direction, normal[:, 1:]], dim=1)
        return torch.where(chosen[:, [0, 1, 2, 3, 4, 4, 5, 5]], a, 0.0)

    def origins(self, a: Tensor, height: int, width: int) -> Tensor:
        """Where the pixels of the augmented images come from, as affine maps `[B, 2, 3]`.

        They map a position (right, down), in pixels from the centre, to the position in the image before.
        """
        _, _, a_2, a_3, a_4, a_5, a_6, a_7 = a.unbind(1)
        smaller, squeezed = torch.exp2(-self.scale * a_2), torch.exp2(-self.stretch * a_5)
        linear = _product(_rotation(a_3), _rotation(-a_4))
        linear = _product(linear * torch.stack([squeezed, 1 / squeezed], dim=1)[:, None], _rotation(a_4))
        linear = linear * smaller[:, None, None]
        shift = self.translation * torch.stack([width * a_6, height * a_7], dim=1)[..., None]
        return torch.cat([linear, -_product(linear, shift)], dim=2)


def told(a: Tensor) -> Tensor:
    """What the network is told of a₀ … a₇, `[B, 9]`."""
    a_0, a_1, a_2, a_3, a_4, a_5, a_6, a_7 = a.unbind(1)
    turn = (a_3.cos() - 1, a_3.sin())
    return torch.stack([a_0, a_1, a_2, *turn, a_5 * a_4.cos(), a_5 * a_4.sin(), a_6, a_7], dim=1)


def warp(x: Tensor, origins: Tensor, low_pass: Tensor) -> Tensor:
    """Images moved by affine maps, without aliasing.

    Upsampled twofold by the filter, interpolated bilinearly, downsampled by the filter: the identity returns the image,
    since the filter is orthonormal to its own shifts by two. arXiv 2006.06676, appendix B.

    Arguments:
        x: images, mirrored beyond their borders, `[B, C, H, W]`.
        origins: where the pixels come from, as `Geometric.origins` gives it, `[B, 2, 3]`.
        low_pass: the filter, of gain √2, `[12]`.

    Returns:
        The moved images, `[B, C, H, W]`.
    """
    b, c, h, w = x.shape
    low_pass = low_pass.to(x.dtype)
    columns, rows = low_pass[None, None, :, None], low_pass[None, None, None]
    fine = F.pad(x, (w - 1, w - 1, h - 1, h - 1), mode="reflect").flatten(0, 1)[:, None]
    crop = _CENTRE + 2 * _MARGIN
    fine = F.conv_transpose2d(fine, columns * math.sqrt(2), stride=(2, 1), padding=(crop, 0))
    fine = F.conv_transpose2d(fine, rows * math.sqrt(2), stride=(1, 2), padding=(0, crop))
    fine = fine.unflatten(0, (b, c))[:, :, 0]

    down, right = (_half_pixels(side, x.device) for side in (h, w))
    matrix = origins[:, :, :, None, None]
    source = matrix[:, :, 0] * right + matrix[:, :, 1] * down[:, None] + matrix[:, :, 2]  # [B, 2, 2 H + 10, 2 W + 10]
    centre = [3 * (side - 1) - 2 * _MARGIN for side in (w, h)]
    last = [size - 1 for size in reversed(fine.shape[2:])]
    place = [(2 * source[:, k] + centre[k]) * (2 / last[k]) - 1 for k in range(2)]
    grid = torch.stack(place, dim=-1).to(x.dtype)
    moved = F.grid_sample(fine, grid, "bilinear", "reflection", align_corners=True).flatten(0, 1)[:, None]

    moved = F.conv2d(moved, columns * math.sqrt(0.5), stride=(2, 1))
    return F.conv2d(moved, rows * math.sqrt(0.5), stride=(1, 2)).unflatten(0, (b, c))[:, :, 0]


def _half_pixels(side: int, device: torch.device) -> Tensor:
    """Positions at which the filter reads to make `side` pixels, in pixels from the centre, float64."""
    taps = len(_SYM6)
    return (torch.arange(2 * side + taps - 2, device=device, dtype=torch.float64) - _CENTRE - (side - 1)) / 2


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # not a @ b, whose last bits depend on the size of the batch
    return (a[..., None] * b[:, None]).sum(2)
