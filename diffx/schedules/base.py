r"""The forward process.

A schedule maps a time t ∈ [0, 1] to the coefficients of

    x_t = α(t)·x + σ(t)·z,   z ~ N(0, I),

with t = 0 clean and t = 1 noisiest. Kingma et al., *Variational Diffusion Models* (arXiv 2107.00630), Sec. 3.1; Karras
et al., *Elucidating the Design Space of Diffusion-Based Generative Models* (arXiv 2206.00364), Sec. 2. Two schedules
with the same range of logSNR describe the same process up to a scaling and a change of time, which is why everything
else in diffx speaks of logSNR.
"""

from abc import ABC, abstractmethod
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffx.utils import expand_as

LOGSNR_MAX = 40.0
"""Bound of |logSNR|: beyond it float32 cannot tell x_t from α·x or from σ·z."""


class NoiseLevel(NamedTuple):
    """A time and the coefficients of the schedule there.

    Either Python numbers (the whole batch is at one time; scalar arithmetic costs next to nothing) or tensors that
    broadcast against x_t, shape `[B, 1, …, 1]` (a time for each sample).

    Arguments:
        t: the time as a denoiser takes it, a tensor of shape `[]` or `[B]`, in [0, 1].
        time: the same time, for arithmetic.
        alpha: signal coefficient α(t).
        sigma: noise coefficient σ(t).
        logsnr: log(α²/σ²), within ±`LOGSNR_MAX`.
        d_alpha: dα/dt; not finite at t = 0 for some schedules.
        d_sigma: dσ/dt; likewise.
    """

    t: Tensor
    time: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor
    logsnr: float | Tensor
    d_alpha: float | Tensor
    d_sigma: float | Tensor


class Schedule(nn.Module, ABC):
    """The forward process: α, σ > 0 on (0, 1) and logSNR strictly decreasing.

    A new schedule writes `forward` alone. Times are float32 or float64 tensors; the coefficients have their dtype.
    """

    @abstractmethod
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients at times t.

        Arguments:
            t: times in [0, 1], shape `[]` or `[B]`.

        Returns:
            α(t) and σ(t), each of the shape of t.
        """

    @property
    def device(self) -> torch.device:
        """Where times are evaluated: the device of the parameters and tables, the CPU if there are none."""
        return next(chain(self.parameters(), self.buffers(), [torch.empty(0)])).device

    def interior(self) -> list[nn.Parameter]:
        """The parameters that move the levels between the ends and leave the ends alone; none unless learned."""
        return []

    def logsnr(self, t: Tensor) -> Tensor:
        """log(α²/σ²) at times t, shape of t, bounded by ±`LOGSNR_MAX`."""
        alpha, sigma = self(t)
        return logsnr(alpha, sigma)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The times at which the schedule has the given logSNR; values beyond its range give t = 0 or 1.

        By sectioning to the last bit of t. A schedule with a closed form may override it; the tests hold it to
        `inverse(logsnr(t)) = t`.

        Arguments:
            logsnr: shape `[]` or `[B]`.

        Returns:
            t in [0, 1], of the same shape and dtype.
        """
        target = logsnr.detach().to(torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        shares = torch.arange(1, 16, dtype=target.dtype, device=target.device).reshape(-1, *(1,) * target.ndim) / 16
        # four bits at a time: a schedule takes little longer for 15 times than for one
        for _ in range(14):
            width = high - low
            nodes = low + shares * width
            cleaner = (self.logsnr(nodes.flatten()).reshape(nodes.shape) >= target).sum(0)
            low, high = low + cleaner / 16 * width, torch.where(cleaner == 15, high, low + (cleaner + 1) / 16 * width)
        # an end of the range is that end itself, not the float below it
        return torch.where(low == 0, low, torch.where(high == 1, high, (low + high) / 2)).to(logsnr.dtype)

    def levels(self, times: Tensor) -> list[NoiseLevel]:
        """The noise levels of a time grid, evaluated once, in float64, before a sampler's loop.

        Arguments:
            times: `[K + 1]` for one grid shared by all samples.

        Returns:
            K + 1 noise levels of Python numbers, with `t` a tensor of shape `[]` on the device of `times`.
        """
        exact = times.detach().to(self.device, torch.float64)
        alpha, sigma, d_alpha, d_sigma = (value.tolist() for value in self._derivatives(exact))
        bounded = logsnr(torch.tensor(alpha, dtype=exact.dtype), torch.tensor(sigma, dtype=exact.dtype)).tolist()
        return [
            NoiseLevel(*level)
            for level in zip(times.unbind(), exact.tolist(), alpha, sigma, bounded, d_alpha, d_sigma, strict=True)
        ]

    def level(self, t: Tensor, like: Tensor) -> NoiseLevel:
        """The noise levels of a batch in which each sample has its own time.

        Arguments:
            t: times, shape `[B]`.
            like: the samples `[B, *]` against which the coefficients shall broadcast.

        Returns:
            One noise level of tensors `[B, 1, …, 1]`.
        """
        values = (t.detach(), *self._derivatives(t.detach()))
        time, alpha, sigma, d_alpha, d_sigma = (expand_as(value, like) for value in values)
        return NoiseLevel(t, time, alpha, sigma, logsnr(alpha, sigma), d_alpha, d_sigma)

    def _derivatives(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # one backward pass each: α and σ of a time depend on no other time
        with torch.inference_mode(False), torch.enable_grad():
            leaf = t.clone().requires_grad_()
            alpha, sigma = self(leaf)
            d_alpha, d_sigma = (
                torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                if value.requires_grad
                else torch.zeros_like(leaf)
                for value in (alpha, sigma)
            )
        return alpha.detach(), sigma.detach(), d_alpha, d_sigma


def logsnr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(α²/σ²) of coefficients of any shape, bounded by ±`LOGSNR_MAX` (there α or σ may be 0)."""
    return (2 * (alpha.log() - sigma.log())).clamp(-LOGSNR_MAX, LOGSNR_MAX)
