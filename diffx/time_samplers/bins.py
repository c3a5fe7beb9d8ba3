"""What the adaptive time samplers share: times drawn from bins, and losses gathered over the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from diffx.utils import Keys


def draw(edges: Tensor, probability: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Times of a density that is constant within each bin.

    Arguments:
        edges: the ends of the bins, increasing, float64 `[J + 1]`.
        probability: the probability of each bin, > 0, summing to 1, float64 `[J]`.
        keys: the addresses of the batch's random numbers.

    Returns:
        t, float32 `[B]`, and the uniform density over theirs, which makes E[correction·f(t)] the uniform mean of f.
    """
    cumulative = probability.cumsum(0)
    u = keys.uniform("time", dtype=torch.float64) * cumulative[-1]
    j = torch.searchsorted(cumulative, u).clamp(max=len(probability) - 1)
    within = ((u - cumulative[j]) / probability[j] + 1).clamp(0, 1)
    width = edges.diff()
    t = (edges[j] + within * width[j]).float()
    return t, (width / width.sum() / probability)[j].float()


def bin_of(t: Tensor, edges: Tensor) -> Tensor:
    """The number of the bin in which each time lies, int64 `[B]`."""
    return torch.bucketize(t.to(edges.dtype), edges[1:-1])


def over_ranks(values: Tensor) -> Tensor:
    """The values `[B, …]` of all ranks, rank after rank: for a micro-batch that is the order of the sample numbers."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def of_each(j: Tensor, bins: int) -> Tensor:
    """Which samples are in which bin, bool `[B, bins]`."""
    return j[:, None] == torch.arange(bins, device=j.device)
