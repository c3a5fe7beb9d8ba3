"""A trained denoiser on another schedule."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from diffx.denoisers.base import Denoiser
from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import expand_as


class Rescheduled(Denoiser):
    r"""A trained denoiser on another schedule: the same estimate at equal logSNR.

    With t′ the time at which the trained schedule has the logSNR of the new one at t,
    x̂(x_t, t) = x̂_trained(x_t·σ′/σ, t′), since x_t/σ depends on logSNR alone. Karras et al. (arXiv 2206.00364), Sec. 2;
    Kingma et al. (arXiv 2107.00630), Sec. 5.1. Outside the range of noise levels seen in training the nearest trained
    level is used. A learned variance is not carried over: it depends on the steps of the trained schedule. Use it when
    a model shall be sampled on another schedule than its own.

    Arguments:
        denoiser: the trained denoiser.
        schedule: the schedule to sample on.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = schedule
        self._trained: Schedule | None = None  # where the host can ask it
        self._known: tuple[float, float] | None = None  # t′ and σ′/σ at the level that is asked for

    def for_trajectory(self) -> Denoiser:
        trained = deepcopy(self.denoiser.schedule).requires_grad_(False).cpu()
        return super().for_trajectory().replaced(_trained=trained)

    def at(self, level: NoiseLevel) -> Denoiser:
        if self._trained is None or isinstance(level.sigma, Tensor):
            return self
        (trained,) = self._trained.levels(self._trained.inverse(torch.tensor([level.logsnr], dtype=torch.float64)))
        time, scale = float(trained.time), _scale((trained.alpha, trained.sigma), (level.alpha, level.sigma))
        inner = self.denoiser.at(trained._replace(t=torch.full_like(level.t, time)))
        return self.replaced(denoiser=inner, _known=(time, scale))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if self._known is not None:
            time, scale = self._known
            return self.denoiser(scale * x_t, torch.full_like(t, time), **cond)
        trained = self.denoiser.schedule
        t_trained = trained.inverse(self.schedule.logsnr(t))
        scale = _scale(trained(t_trained), self.schedule(t))
        return self.denoiser((expand_as(scale, x_t) * x_t).to(x_t.dtype), t_trained, **cond)


def _scale(to: tuple[Any, Any], of: tuple[Any, Any]) -> Any:
    # at equal logSNR α'/α = σ'/σ = r'/r; the root is finite where either coefficient is 0
    return ((to[0] ** 2 + to[1] ** 2) / (of[0] ** 2 + of[1] ** 2)) ** 0.5
