"""A network made a denoiser by a schedule and a parameterization."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffx.denoisers.base import Denoiser
from diffx.parameterizations import Parameterization
from diffx.schedules import Schedule
from diffx.schedules.base import logsnr
from diffx.utils import DiffxError, expand_as


class Preconditioned(Denoiser):
    r"""A network made a denoiser by a schedule and a parameterization.

    x̂ = c_skip·x_t + c_out·F(c_in·x_t, logSNR); Karras et al. (arXiv 2206.00364), Eq. 7. The coefficients are computed
    in the dtype of t (float32 or better), whatever the autocast dtype; only the network runs in reduced precision. Use
    it when a model is trained; the variances of ancestral sampling stay fixed.

    Arguments:
        backbone: the network F: `backbone(x [B, *], logsnr [B], **cond) -> [B, *]`.
        schedule: the forward process.
        parameterization: what the output of the network means.

    Raises:
        DiffxError: if the parameterization is undefined at the end of the schedule (ε where α reaches 0).

    Attributes:
        outputs: channels of the network's output for each channel of the data.
    """

    outputs: ClassVar[int] = 1

    def __init__(self, backbone: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.parameterization = parameterization
        refuse_undefined(schedule, parameterization)

    def network(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The network's own output and the coefficients that turn it into x̂.

        Arguments:
            x_t: noisy samples, `[B, *]`.
            t: times in [0, 1], `[]` or `[B]`.
            cond: conditions for the network.

        Returns:
            F, shape `[B, *]`, in float32 or better; c_skip and c_out, each of the shape of t.
        """
        return network(self.backbone, self.schedule, self.parameterization, x_t, t, **cond)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return estimate(x_t, *self.network(x_t, t, **cond))


def network(
    backbone: nn.Module, schedule: Schedule, parameterization: Parameterization, x_t: Tensor, t: Tensor, **cond: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a backbone, in the dtype of x_t, and c_skip and c_out, each of the shape of t."""
    alpha, sigma = schedule(t)
    c_in, c_skip, c_out = parameterization(alpha, sigma)
    level = logsnr(alpha, sigma).expand(x_t.shape[0])
    output = backbone((expand_as(c_in, x_t) * x_t).to(x_t.dtype), level.to(x_t.dtype), **cond)
    return output.to(x_t.dtype), c_skip, c_out


def estimate(x_t: Tensor, output: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """x̂ = c_skip·x_t + c_out·F, in the dtype of x_t."""
    return (expand_as(c_skip, x_t) * x_t + expand_as(c_out, x_t) * output).to(x_t.dtype)


def refuse_undefined(schedule: Schedule, parameterization: Parameterization) -> None:
    """Raises `DiffxError` if the parameterization is undefined at the end of the schedule (ε where α reaches 0)."""
    with torch.no_grad():
        end = parameterization(*schedule(torch.ones(())))
    if not all(torch.isfinite(c) for c in end):
        raise DiffxError(
            f"parameterization {type(parameterization).__name__} is undefined for schedule "
            f"{type(schedule).__name__}, whose alpha reaches 0 at t = 1; choose parameterization=v, x0, flow or "
            "edm, or a schedule that ends above zero SNR (linear, cosine, edm)"
        )
