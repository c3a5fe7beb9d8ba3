"""A denoiser whose networks run in reduced precision."""

import torch
from torch import Tensor

from diffx.denoisers.base import Denoiser
from diffx.schedules import NoiseLevel
from diffx.utils import DiffxError

DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What matrix products and convolutions are computed in, by Lightning's names; None is as the weights are."""


class Autocast(Denoiser):
    r"""A denoiser whose matrix products and convolutions are computed in reduced precision.

    Weights, coefficients and estimates keep their precision: `torch.autocast` lowers matrix products and convolutions,
    of which there are none but the networks'. Use it around everything that is asked, guides included, when samples
    shall be made faster on a GPU.

    Arguments:
        denoiser: the denoiser.
        precision: `bf16-mixed`, `16-mixed`, or `32-true`, which changes nothing.

    Raises:
        DiffxError: if there is no such precision.
    """

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise DiffxError(f"evaluation.precision={precision} is none to sample in; choose {', '.join(DTYPES)}")
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.dtype = DTYPES[precision]

    def at(self, level: NoiseLevel) -> Denoiser:
        return self.replaced(denoiser=self.denoiser.at(level))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype is not None):
            return self.denoiser(x_t, t, **cond)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ and v of the denoiser, its networks in reduced precision."""
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype is not None):
            return self.denoiser.posterior(x_t, t, s, **cond)
