"""IDDPM's importance sampling of times."""

import torch
from torch import Tensor, nn

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.time_samplers.bins import bin_of, draw, of_each, over_ranks
from diffx.utils import Keys


class Importance(TimeSampler, nn.Module):
    r"""Times in proportion to the root mean square of their latest losses, corrected for it.

    p_j ∝ √E[L²], over the last n losses in bin j of J equal bins of time, mixed with a little of the uniform density;
    the correction 1/(J·p_j) keeps the mean loss that of uniform times, with the least variance. Uniform until every bin
    has n losses. Nichol and Dhariwal, *Improved DDPM* (arXiv 2102.09672), Eq. 18, with a bin for each of T steps.

    What is drawn does not depend on how the global batch is cut: losses enter the history in the order of the sample
    numbers, those of all ranks on every rank, and are used from the next optimizer step on.

    Use it when the loss differs by orders of magnitude between noise levels, as the variational bound's does.

    Arguments:
        bins: J, the number of bins.
        history: n, the losses remembered per bin.
        uniform: the share of uniform times, in (0, 1]; no correction exceeds its inverse.
        t_min: the smallest time, in [0, 1).
    """

    def __init__(self, bins: int = 100, history: int = 10, uniform: float = 0.001, t_min: float = 1e-5) -> None:
        super().__init__()
        self.bins = bins
        self.uniform = uniform
        self.register_buffer("edges", torch.linspace(t_min, 1, bins + 1, dtype=torch.float64), persistent=False)
        self.register_buffer("history", torch.zeros(bins, history))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("probability", torch.full((bins,), 1 / bins, dtype=torch.float64))
        self.register_buffer("batch", torch.full((1,), -1))
        self.edges: Tensor
        self.history: Tensor
        self.count: Tensor
        self.probability: Tensor
        self.batch: Tensor

    @torch.no_grad()
    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        batch = keys.index[:1] // keys.total
        # all micro-batches of a step draw from one density; without a branch, which would wait for the device
        self.probability.copy_(torch.where(batch == self.batch, self.probability, self._target()))
        self.batch.copy_(batch)
        return draw(self.edges, self.probability, keys)

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        loss = loss.nan_to_num(posinf=0, neginf=0).to(t.dtype)
        t, loss = over_ranks(torch.stack([t, loss], dim=1)).unbind(1)
        j = bin_of(t, self.edges)
        mine = of_each(j, self.bins)
        slots = self.history.shape[1]
        arrival = (mine.cumsum(0) - 1).gather(1, j[:, None]).squeeze(1)  # [B], how many in its bin came before
        new = mine.sum(0)
        slot = (self.count[j] + arrival) % slots
        # of more than n losses in one bin only the last n are written, the others into a cell of no use
        kept = new[j] - arrival <= slots
        target = torch.where(kept, j * slots + slot, self.bins * slots)
        cells = torch.cat([self.history.flatten(), loss.new_zeros(1)])
        cells[target] = loss.to(cells.dtype)
        self.history.copy_(cells[:-1].reshape_as(self.history))
        self.count += new

    def _target(self) -> Tensor:
        root = self.history.double().square().mean(1).sqrt()
        share = (1 - self.uniform) * root / root.sum() + self.uniform / self.bins
        known = (self.count >= self.history.shape[1]).all() & (root.sum() > 0)
        return torch.where(known, share, torch.full_like(share, 1 / self.bins))
