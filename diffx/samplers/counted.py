"""Counting denoiser calls."""

from torch import Tensor

from diffx.denoisers import Denoiser


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
        self.calls = 0
        self.samples = 0

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self._count(x_t)
        return self.denoiser(x_t, t, **cond)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        self._count(x_t)
        return self.denoiser.posterior(x_t, t, s, **cond)

    def _count(self, x_t: Tensor) -> None:
        self.calls += 1
        self.samples += len(x_t)
