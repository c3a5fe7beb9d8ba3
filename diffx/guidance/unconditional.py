"""A conditional model told nothing."""

from torch import Tensor

from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser
from diffx.schedules import NoiseLevel


class ToldNothing(Denoiser):
    r"""The unconditional estimate x̂_∅ of a conditional model, whatever class is asked for.

    Ho and Salimans (arXiv 2207.12598), Sec. 3.2: the null condition stands for the unconditional model. Use it when the
    unconditional model itself is to be measured, or as the innermost of several guidances: classifier guidance around
    it is that of an unconditional model.

    Arguments:
        denoiser: a denoiser trained with dropped conditions.
        conditioner: gives the null conditions.
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.conditioner = conditioner

    def at(self, level: NoiseLevel) -> Denoiser:
        return self.replaced(denoiser=self.denoiser.at(level))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser(x_t, t, **self.conditioner.null(len(x_t), x_t.device))

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂_∅ and the v of the unconditional step."""
        return self.denoiser.posterior(x_t, t, s, **self.conditioner.null(len(x_t), x_t.device))
