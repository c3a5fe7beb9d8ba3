"""Guidance by a weaker model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffx.denoisers import Denoiser, Rescheduled
from diffx.guidance.guided import Guided, device_of
from diffx.guidance.interval import Rows, select
from diffx.guidance.rules import Rule
from diffx.schedules import Schedule


class Autoguidance(Guided):
    r"""Autoguidance: the guide is a worse model of the same data, told the same.

    x̂ = x̂_weak + w·(x̂ − x̂_weak). Karras et al., *Guiding a Diffusion Model with a Bad Version of Itself* (arXiv
    2406.02507), Eq. 3. What both models get wrong, the weak one more so, is what the difference corrects. The guide may
    have been trained on another schedule: it is asked at equal logSNR. Use it when classifier-free guidance costs too
    much variety, or the model is unconditional; the best guide is imperfect in the way the model itself is, and more
    so: a smaller network, or a checkpoint at a fraction of the training.

    Arguments:
        denoiser: the denoiser that is guided.
        guide: the weaker denoiser; it takes the same conditions.
        scale: w, the guidance scale; 1 is unguided.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        rescale: φ ∈ [0, 1], how far the contrast of the unguided estimate is restored.
        rule: how the two estimates are combined; None is `Linear`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Denoiser,
        scale: float = 2.0,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        rule: Rule | None = None,
    ) -> None:
        super().__init__(denoiser, scale, interval, rescale, rule)
        same = _agree(denoiser.schedule, guide.schedule)
        guide = guide.to(device_of(denoiser))
        self.guide = guide if same else Rescheduled(guide, denoiser.schedule)

    def estimates(self, x_t: Tensor, t: Tensor, rows: Rows, **cond: Tensor) -> tuple[Tensor, Tensor]:
        x_hat = self.denoiser(x_t, t, **cond)
        told = {name: value[rows] for name, value in cond.items()}
        return x_hat, self.guide(x_t[rows], select(t, rows), **told)


@torch.no_grad()
def _agree(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules are the same function: then nothing has to be inverted at every step."""
    times = torch.linspace(0, 1, 129, dtype=torch.float64)
    pairs = zip(a(times.to(a.device)), b(times.to(b.device)), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)
