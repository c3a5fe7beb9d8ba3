"""Attention over tokens."""

from torch import Tensor, nn
from torch.nn import functional as F

from diffx.utils import DiffxError


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, section 3.2).

    Arguments:
        channels: the width C of the tokens.
        heads: the number of heads.

    Raises:
        DiffxError: if `channels` is no multiple of `heads`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise DiffxError(f"{heads} heads do not divide {channels} channels; choose a divisor of {channels}")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mixes the tokens of each sample.

        Arguments:
            tokens: the tokens, shape `[B, N, C]`.

        Returns:
            The mixed tokens, shape `[B, N, C]`.
        """
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
