"""Attention over tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.utils import DiffxError

_EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, section 3.2).

    Arguments:
        channels: the width C of the tokens.
        heads: the number of heads.
        qk_norm: whether the queries and keys of each head are divided by their root mean square and multiplied by a
            learned scale, one for all heads. Their products then stay bounded in long training and in half precision
            (Dehghani et al., *Scaling Vision Transformers to 22 Billion Parameters*, arXiv 2302.05442, section 2, with
            LayerNorm; Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*, arXiv
            2403.03206, section 5.3.2, with RMSNorm as here).

    Raises:
        DiffxError: if `channels` is no multiple of `heads`.
    """

    def __init__(self, channels: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise DiffxError(f"{heads} heads do not divide {channels} channels; choose a divisor of {channels}")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm_q = RMSNorm(channels // heads) if qk_norm else None
        self.norm_k = RMSNorm(channels // heads) if qk_norm else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Mixes the tokens of each sample.

        Arguments:
            tokens: the tokens, shape `[B, N, C]`.

        Returns:
            The mixed tokens, shape `[B, N, C]`.
        """
        # each [B, N, H, C / H], a view
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(tokens).chunk(3, dim=-1))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class RMSNorm(nn.Module):
    """x over its root mean square, times a learned scale; torch's does it in one pass only for equal dtypes of both.

    Arguments:
        channels: the number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of x `[*, C]`."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), _EPS)
