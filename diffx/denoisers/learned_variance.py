"""A network that predicts the variance of a step beside the clean sample."""

from typing import ClassVar

from torch import Tensor, nn

from diffx.denoisers.base import Denoiser
from diffx.denoisers.preconditioned import (
    Coefficients,
    coefficients,
    coefficients_of,
    estimate,
    network,
    refuse_undefined,
)
from diffx.parameterizations import Parameterization
from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import DiffxError


class LearnedVariance(Denoiser):
    r"""A `Preconditioned` network with twice the output channels: F and, per dimension, v.

    The second half of the output o gives v = (o + 1)/2, and the step from t to s has the variance
    exp(v·log β + (1 − v)·log β̃). Nichol and Dhariwal, *Improved DDPM* (arXiv 2102.09672), Sec. 3.1, Eq. 15. Use it
    when few ancestral steps or good likelihoods are wanted: objective=hybrid trains v, sampler=ddpm_learned uses it;
    everything else sees a denoiser like any other.

    Arguments:
        backbone: the network, `backbone(x [B, C, *], logsnr [B], **cond) -> [B, 2·C, *]`.
        schedule: the forward process.
        parameterization: what the first half of the output means.

    Raises:
        DiffxError: if the parameterization is undefined at the end of the schedule, or, when called, the backbone has
            not twice the channels of its input.

    Attributes:
        outputs: channels of the network's output for each channel of the data.
    """

    outputs: ClassVar[int] = 2
    known: Coefficients | None = None

    def __init__(self, backbone: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.parameterization = parameterization
        refuse_undefined(schedule, parameterization)

    def coefficients(self, t: Tensor) -> Coefficients:
        """As `Preconditioned.coefficients`."""
        return self.known or coefficients(self.schedule, self.parameterization, t)

    def at(self, level: NoiseLevel) -> Denoiser:
        """As `Preconditioned.at`."""
        return self.replaced(known=coefficients_of(level, self.parameterization))

    def network(self, x_t: Tensor, at: Coefficients, **cond: Tensor) -> Tensor:
        """F, as `Preconditioned.network` gives it."""
        return self._halves(x_t, at, **cond)[0]

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        at = self.coefficients(t)
        return estimate(x_t, self.network(x_t, at, **cond), at)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ and v, each `[B, *]`; v was learned for the step of training and is taken for any s."""
        at = self.coefficients(t)
        output, o = self._halves(x_t, at, **cond)
        return estimate(x_t, output, at), (o + 1) / 2

    def _halves(self, x_t: Tensor, at: Coefficients, **cond: Tensor) -> tuple[Tensor, ...]:
        output = network(self.backbone, x_t, at, **cond)
        if output.shape[1] != 2 * x_t.shape[1]:
            raise DiffxError(
                f"a learned variance needs a backbone with {2 * x_t.shape[1]} output channels, and this one has "
                f"{output.shape[1]}; set backbone.out_channels={2 * x_t.shape[1]}"
            )
        return output.chunk(2, dim=1)
