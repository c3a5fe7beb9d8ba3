"""Ground: the pieces networks are built of. Knows nothing of diffusion but the noise level."""

from diffx.nn.attention import SelfAttention
from diffx.nn.embedding import ConditionEmbedding, sincos_positions, sinusoids
from diffx.nn.init import xavier, zeros

__all__ = ["ConditionEmbedding", "SelfAttention", "sincos_positions", "sinusoids", "xavier", "zeros"]
