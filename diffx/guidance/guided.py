"""What all guidance by a second estimate has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from diffx.denoisers import Denoiser
from diffx.guidance.interval import EVERYWHERE, Interval, Rows, select
from diffx.guidance.rules import Linear, Rule, rescaled
from diffx.schedules import NoiseLevel


class Guided(Denoiser, ABC):
    r"""An estimate moved away from that of a guide.

    x̂ = rule(x̂₊, x̂₋, w), by default x̂₋ + w·(x̂₊ − x̂₋), then rescaled (arXiv 2305.08891, Sec. 3.4), at noise levels within
    an interval (arXiv 2404.07724); elsewhere, and for w = 1, x̂ = x̂₊ and the guide is not evaluated. What the guide is
    distinguishes the subclasses, which write `estimates` alone. The score moves by the same rule, hence with the linear
    one the samples follow, at each noise level, the score of p₊(x_t)^w·p₋(x_t)^(1−w).

    Arguments:
        denoiser: the denoiser that is guided.
        scale: w; 1 is unguided.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        rescale: φ ∈ [0, 1], how far the contrast of the unguided estimate is restored.
        rule: how the two estimates are combined; None is `Linear`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        rule: Rule | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.scale = scale
        self.interval = Interval(interval)
        self.rescale = rescale
        self.rule = Linear() if rule is None else rule

    @abstractmethod
    def estimates(self, x_t: Tensor, t: Tensor, rows: Rows, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """Both estimates, of denoisers that are asked at t.

        Arguments:
            x_t: noisy samples, `[B, *]`.
            t: times, `[]` or `[B]`.
            rows: the n samples for which the guide is asked.
            cond: conditions, each `[B, …]`.

        Returns:
            x̂₊ of all samples, `[B, *]`, and x̂₋ of the chosen ones, `[n, *]`.
        """

    def at(self, level: NoiseLevel) -> Denoiser:
        if isinstance(level.sigma, Tensor):  # samples at different levels: which are within is known when asked
            return self
        if self.scale == 1 or level not in self.interval:
            return self.denoiser.at(level)
        asked = {name: part.at(level) for name, part in self.named_children() if isinstance(part, Denoiser)}
        return self.replaced(interval=EVERYWHERE, **asked)

    def for_trajectory(self) -> Denoiser:
        return super().for_trajectory().replaced(rule=self.rule.for_trajectory())

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        rows = None if self.scale == 1 else self.interval.rows(self.schedule, t)
        if rows is None:
            return self.denoiser(x_t, t, **cond)
        x_hat, guide = self.estimates(x_t, t, rows, **cond)
        positive = x_hat[rows]
        guided = self.rule(positive, guide, self.scale)
        if self.rescale > 0:
            guided = rescaled(guided, positive, self.rescale)
        return guided if isinstance(rows, slice) else x_hat.index_copy(0, rows, guided)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """The guided estimate and the v of the unguided denoiser, which is evaluated once more for it."""
        return self(x_t, t, **cond), self.denoiser.posterior(x_t, t, s, **cond)[1]


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies, and its guide shall: the device of its weights or tables, the CPU if there are none."""
    return next(chain(model.parameters(), model.buffers(), [torch.empty(0)])).device


def told_otherwise(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, rows: Rows, cond: dict[str, Tensor], other: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Estimates under two conditions from one forward pass, of up to twice the batch.

    Arguments:
        denoiser: the denoiser.
        x_t: noisy samples, `[B, *]`.
        t: times, `[]` or `[B]`.
        rows: the n samples to be told otherwise.
        cond: the conditions of all samples, each `[B, …]`.
        other: what the n are told instead, each `[n, …]`; a condition that is absent here is told as it is.

    Returns:
        The estimates of all samples, `[B, *]`, and those of the n told otherwise, `[n, *]`.
    """
    guided = x_t[rows]
    both = {name: torch.cat([value, other.get(name, value[rows])]) for name, value in cond.items()}
    times = torch.cat([t, select(t, rows)]) if t.ndim else t
    return denoiser(torch.cat([x_t, guided]), times, **both).split([len(x_t), len(guided)])
