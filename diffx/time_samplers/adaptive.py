"""VDM++'s adaptive density of noise levels."""

import torch
from torch import Tensor, nn

from diffx.schedules import Schedule
from diffx.time_samplers.base import TimeSampler
from diffx.time_samplers.bins import bin_of, draw, of_each, over_ranks
from diffx.utils import Keys


class Adaptive(TimeSampler, nn.Module):
    r"""Noise levels in proportion to their share of the loss, as a running mean over logSNR tells it.

    The range of logSNR from t_min to 1 − t_min is cut into J equal bins, the last reaching to 1. Bin j, of length Δ_j
    in time, is drawn with p_j ∝ Δ_j·E_j, where E_j is the exponential moving average of its mean loss, and t uniformly
    within it. Kingma and Gao, *Understanding Diffusion Objectives as the ELBO* (arXiv 2303.00848), in the section on
    the adaptive noise schedule: the weighting stays what it is, since the loss is divided by the density. Here the
    correction Δ_j/((1 − t_min)·p_j) does so, and the mean loss is that of uniform times. Uniform in logSNR until every
    bin has been seen.

    What is drawn does not depend on how the global batch is cut, up to the rounding of sums in float64: the losses of
    all ranks enter on every rank, and are used from the next optimizer step on.

    Use it when weighting or schedule vary between arms and each shall be trained at its own best density.

    Arguments:
        bins: J, the number of bins.
        decay: of the moving average, per optimizer step in which a bin is seen, in [0, 1).
        uniform: the share of uniform times, in (0, 1]; no correction exceeds its inverse.
        t_min: the smallest time, in (0, 1/2).
    """

    def __init__(self, bins: int = 100, decay: float = 0.999, uniform: float = 0.001, t_min: float = 1e-5) -> None:
        super().__init__()
        self.bins = bins
        self.decay = decay
        self.uniform = uniform
        self.t_min = t_min
        self.register_buffer("edges", torch.linspace(t_min, 1, bins + 1, dtype=torch.float64), persistent=False)
        self.register_buffer("average", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("mass", torch.zeros(bins, dtype=torch.float64))  # of the average's weights
        self.register_buffer("sums", torch.zeros(2, bins, dtype=torch.float64))  # of this step: losses, samples
        self.register_buffer("batch", torch.full((1,), -1))
        self.edges: Tensor
        self.average: Tensor
        self.mass: Tensor
        self.sums: Tensor
        self.batch: Tensor

    @torch.no_grad()
    def __call__(self, schedule: Schedule, keys: Keys) -> tuple[Tensor, Tensor]:
        batch = keys.index[:1] // keys.total
        self._fold(batch != self.batch)
        self.batch.copy_(batch)
        self.edges.copy_(self._edges(schedule))
        return draw(self.edges, self._probability(), keys)

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        loss = loss.nan_to_num(posinf=0, neginf=0).to(t.dtype)
        t, loss = over_ranks(torch.stack([t, loss], dim=1)).unbind(1)
        mine = of_each(bin_of(t, self.edges), self.bins).double()
        self.sums += torch.stack([(mine * loss[:, None]).sum(0), mine.sum(0)])

    def _fold(self, new: Tensor) -> None:
        """Takes the finished step into the average; `new` bool `[1]` says whether it is finished."""
        total, count = self.sums
        step = (new & (count > 0)) * total.new_full((), 1 - self.decay)
        self.average.lerp_(total / count.clamp(min=1), step)
        self.mass.lerp_(torch.ones_like(self.mass), step)
        self.sums.copy_(torch.where(new, torch.zeros_like(self.sums), self.sums))

    def _edges(self, schedule: Schedule) -> Tensor:
        # not to 1 itself, where some schedules have no signal and float32 no room for bins
        ends = torch.tensor([self.t_min, 1 - self.t_min], dtype=torch.float64, device=self.edges.device)
        clean, noisy = schedule.logsnr(ends)
        fraction = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=self.edges.device)
        times = schedule.inverse(torch.lerp(clean, noisy, fraction))
        return torch.cat([ends[:1], times[1:-1], torch.ones_like(ends[:1])])

    def _probability(self) -> Tensor:
        width = self.edges.diff() / (1 - self.t_min)
        # divided by its weights' sum, an average that starts at 0 is not biased towards it
        share = width * self.average / self.mass.clamp(min=1e-300)
        target = (1 - self.uniform) * share / share.sum() + self.uniform * width
        known = (self.mass > 0).all() & (share.sum() > 0)
        return torch.where(known, target, torch.full_like(width, 1 / self.bins))
