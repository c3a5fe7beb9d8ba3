"""A network made a denoiser by a schedule and a parameterization."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffx.denoisers.base import Denoiser
from diffx.parameterizations import Parameterization
from diffx.schedules import NoiseLevel, Schedule
from diffx.schedules.base import logsnr
from diffx.utils import DiffxError, expand_as


class Coefficients(NamedTuple):
    """All that is computed of a time, once for a call of the network and its loss.

    Each of the shape of t, or a Python number where all of the batch is at one time that the host knows.

    Arguments:
        alpha: signal coefficient α(t).
        sigma: noise coefficient σ(t).
        logsnr: log(α²/σ²), bounded.
        c_in: what x_t is multiplied by before the network.
        c_skip: what x_t counts in x̂.
        c_out: what the network's output counts in x̂.
    """

    alpha: Any
    sigma: Any
    logsnr: Any
    c_in: Any
    c_skip: Any
    c_out: Any


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
    known: Coefficients | None = None

    def __init__(self, backbone: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.parameterization = parameterization
        refuse_undefined(schedule, parameterization)

    def coefficients(self, t: Tensor) -> Coefficients:
        """The coefficients of schedule and parameterization at times t in [0, 1], `[]` or `[B]`."""
        return self.known or coefficients(self.schedule, self.parameterization, t)

    def at(self, level: NoiseLevel) -> Denoiser:
        """With the coefficients of the level as numbers, so that no schedule is evaluated on the device."""
        return self.replaced(known=coefficients_of(level, self.parameterization))

    def network(self, x_t: Tensor, at: Coefficients, **cond: Tensor) -> Tensor:
        """The network's own output.

        Arguments:
            x_t: noisy samples, `[B, *]`.
            at: the coefficients at their times.
            cond: conditions for the network.

        Returns:
            F, shape `[B, *]`, in the dtype of x_t.
        """
        return network(self.backbone, x_t, at, **cond)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        at = self.coefficients(t)
        return estimate(x_t, self.network(x_t, at, **cond), at)


def coefficients(schedule: Schedule, parameterization: Parameterization, t: Tensor) -> Coefficients:
    """The coefficients of a schedule and a parameterization at times t."""
    alpha, sigma = schedule(t)
    return Coefficients(alpha, sigma, logsnr(alpha, sigma), *parameterization(alpha, sigma))


def coefficients_of(level: NoiseLevel, parameterization: Parameterization) -> Coefficients | None:
    """The coefficients of a noise level, as numbers in float64; None for one of tensors."""
    if isinstance(level.alpha, Tensor):
        return None
    alpha, sigma = torch.tensor([level.alpha, level.sigma], dtype=torch.float64)
    scales = (float(c) for c in parameterization(alpha, sigma))
    return Coefficients(level.alpha, level.sigma, level.logsnr, *scales)


def network(backbone: nn.Module, x_t: Tensor, at: Coefficients, **cond: Tensor) -> Tensor:
    """The output of a backbone, in the dtype of x_t."""
    if isinstance(at.logsnr, Tensor):
        scaled, level = (expand_as(at.c_in, x_t) * x_t).to(x_t.dtype), at.logsnr.expand(x_t.shape[0]).to(x_t.dtype)
    else:
        scaled, level = at.c_in * x_t, x_t.new_full(x_t.shape[:1], at.logsnr)
    return backbone(scaled, level, **cond).to(x_t.dtype)


def estimate(x_t: Tensor, output: Tensor, at: Coefficients) -> Tensor:
    """x̂ = c_skip·x_t + c_out·F, in the dtype of x_t."""
    if isinstance(at.c_skip, Tensor):
        return (expand_as(at.c_skip, x_t) * x_t + expand_as(at.c_out, x_t) * output).to(x_t.dtype)
    return (at.c_skip * x_t).add_(output, alpha=at.c_out)


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
