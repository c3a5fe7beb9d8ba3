r"""The diffusion transformer.

Peebles and Xie, *Scalable Diffusion Models with Transformers*, arXiv 2212.09748, with adaLN-Zero (section 3.2,
figure 3): every block is

    x ← x + gate₁ · attention(LN(x) · (1 + scale₁) + shift₁)
    x ← x + gate₂ · mlp(LN(x) · (1 + scale₂) + shift₂)

where the six vectors are a linear function, zero at first, of the embedding of noise level and class. So every block
starts as the identity, and the network as zero.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.backbones.base import Backbone
from diffx.nn import ConditionEmbedding, SelfAttention, sincos_positions, xavier, zeros
from diffx.utils import DiffxError

_FEATURES = 256


class DiT(Backbone):
    """A transformer over patches, conditioned by adaLN-Zero (arXiv 2212.09748).

    Arguments:
        in_channels: the channels of the input.
        image_size: height and width of the input, in pixels.
        patch_size: height and width of a patch, in pixels.
        width: the channels of a token.
        depth: the number of blocks.
        heads: the number of attention heads.
        num_classes: the number of classes without the null class; 0 for a network without labels.
        mlp_ratio: the width of the MLP's hidden layer over `width`.
        qk_norm: whether attention normalises queries and keys; see `SelfAttention`. The published models do not.
        out_channels: the channels of the output; `in_channels` by default. The published models have twice as many, for
            a learned variance.

    Raises:
        DiffxError: if patches do not tile the image, or heads or the position embedding do not divide the width.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 0,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise DiffxError(
                f"patches of {patch_size} do not tile an image of {image_size}; "
                f"image_size must be a multiple of {patch_size}, or choose another patch_size"
            )
        if width % 4:
            raise DiffxError(f"width is {width}, but the position embedding needs a multiple of 4")
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid = image_size // patch_size

        self.patch_in = xavier(nn.Linear(in_channels * patch_size**2, width))
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)
        self.embedding = ConditionEmbedding(_FEATURES, width, num_classes)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.parts = tuple(self.blocks)
        self.modulation = zeros(nn.Linear(width, 2 * width))
        self.patch_out = zeros(nn.Linear(width, self.out_channels * patch_size**2))
        self._init_embedding()

    def _init_embedding(self) -> None:
        for weight in (w for w in self.embedding.parameters() if w.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.embedding.level_in.bias)
        nn.init.zeros_(self.embedding.level_out.bias)

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Applies the network; see `Backbone.forward`. The spatial size is the one given at construction."""
        if x.shape[1:] != (self.in_channels, self.image_size, self.image_size):
            raise DiffxError(
                f"the network takes inputs of shape [B, {self.in_channels}, {self.image_size}, {self.image_size}], "
                f"not {list(x.shape)}; set backbone.in_channels and backbone.image_size to those of the data"
            )
        tokens = self.patch_in(patchify(x, self.patch_size)) + self.positions
        embedding = self.embedding(logsnr, label)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        return unpatchify(self.patch_out(modulate(tokens, shift, scale)), self.patch_size, self.grid)


class Block(nn.Module):
    """A transformer block with adaLN-Zero.

    Arguments:
        width: the channels C of a token, and of the embedding.
        heads: the number of attention heads.
        mlp_ratio: the width of the MLP's hidden layer over `width`.
        qk_norm: whether attention normalises queries and keys.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool = False) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention = SelfAttention(width, heads, qk_norm)
        xavier(self.attention.qkv)
        xavier(self.attention.out)
        self.mlp = nn.Sequential(
            xavier(nn.Linear(width, hidden)), nn.GELU(approximate="tanh"), xavier(nn.Linear(hidden, width))
        )
        self.modulation = zeros(nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Applies the block.

        Arguments:
            tokens: the tokens, shape `[B, N, C]`.
            embedding: noise level and class, shape `[B, C]`.

        Returns:
            The new tokens, shape `[B, N, C]`.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        tokens = torch.addcmul(tokens, gate_1, self.attention(modulate(tokens, shift_1, scale_1)))
        return torch.addcmul(tokens, gate_2, self.mlp(modulate(tokens, shift_2, scale_2)))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(tokens) · (1 + scale) + shift; tokens `[B, N, C]`, shift and scale `[B, 1, C]`."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), 1 + scale)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cuts images into square patches.

    Arguments:
        x: the images, shape `[B, C, H, W]`.
        patch_size: height and width P of a patch.

    Returns:
        The patches, rows first, shape `[B, (H / P) * (W / P), C * P * P]`.
    """
    patches = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, C, H / P, P, W / P, P]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, rows: int) -> Tensor:
    """Puts the patches of `patchify` together again.

    Arguments:
        tokens: the patches, rows first, shape `[B, N, C * P * P]`.
        patch_size: height and width P of a patch.
        rows: the number of rows of patches, H / P.

    Returns:
        The images, shape `[B, C, H, W]`.
    """
    patches = tokens.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (rows, -1))  # [B, H/P, W/P, C, P, P]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
