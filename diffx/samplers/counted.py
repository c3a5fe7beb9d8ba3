"""Counting denoiser calls."""

from dataclasses import dataclass

from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.schedules import NoiseLevel


@dataclass
class Counts:
    """Calls, and samples in all of them together."""

    calls: int = 0
    samples: int = 0


class Counted(Denoiser):
    r"""A denoiser that counts its calls.

    Evaluations per sample are `samples` over the number of samples made. Use it when a sampler finds its steps itself:
    put it around the denoiser that the sampler gets.

    Arguments:
        denoiser: the denoiser.

    Attributes:
        calls: denoiser calls so far.
        samples: samples in all of them together.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.counts = Counts()

    @property
    def calls(self) -> int:
        return self.counts.calls

    @property
    def samples(self) -> int:
        return self.counts.samples

    @samples.setter
    def samples(self, value: int) -> None:
        self.counts.samples = value

    def at(self, level: NoiseLevel) -> Denoiser:
        return self.replaced(denoiser=self.denoiser.at(level))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self._count(x_t)
        return self.denoiser(x_t, t, **cond)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        self._count(x_t)
        return self.denoiser.posterior(x_t, t, s, **cond)

    def _count(self, x_t: Tensor) -> None:
        self.counts.calls += 1
        self.counts.samples += len(x_t)
