"""The interface of likelihoods, and what they share."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.schedules import Schedule
from diffx.utils import Keys


class Likelihood(ABC):
    """Minus the log-likelihood of data under a denoiser, or an upper bound of it."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x: Tensor, keys: Keys, **cond: Tensor) -> dict[str, Tensor]:
        """An unbiased estimate for each sample.

        Arguments:
            denoiser: the model.
            x: clean samples, `[B, *]`, such as pixels in [−1, 1].
            keys: the addresses of the samples' random numbers.
            cond: conditions, each `[B, …]`.

        Returns:
            `nats` `[B]`, and the terms it is made of, each `[B]`.
        """


def bits_per_dim(nats: Tensor, dimensions: int) -> tuple[float, float]:
    """The mean in bits per dimension, and its standard error over samples.

    Arguments:
        nats: minus the log-likelihood of each sample, `[N]`, N > 1.
        dimensions: the number of dimensions of a sample.
    """
    bits = nats.double() / (dimensions * math.log(2))
    return bits.mean().item(), (bits.std() / len(bits) ** 0.5).item()


def prior_nats(schedule: Schedule, x: Tensor) -> Tensor:
    """KL(q(x_1 | x) ‖ N(0, σ(1)²·I)) = ½·SNR(1)·‖x‖², `[B]`: the law that samplers start from."""
    end = schedule.logsnr(torch.ones((), dtype=torch.float64, device=x.device)).exp().to(x.dtype)
    return 0.5 * end * x.square().flatten(1).sum(1)


def gaussian_nats(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """−log of the probability that a Gaussian gives the cell of x, summed over a sample's dimensions.

    The cells are those of `levels` equally spaced values in [−1, 1], the outermost two unbounded (Ho et al., arXiv
    2006.11239, Eq. 13).

    Arguments:
        x: one of these values per dimension, `[B, *]`.
        mean: of the Gaussian, `[B, *]`.
        std: its standard deviation, broadcasting against x.
        levels: 256 for 8-bit pixels; 0 for continuous data, whose density is taken.

    Returns:
        Nats, `[B]`.
    """
    if levels == 0:
        return (0.5 * ((x - mean) / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
    half = 1 / (levels - 1)
    upper, lower = (x + half - mean) / std, (x - half - mean) / std
    # in the left tail Φ is exact, and so is the difference
    right = upper + lower > 0
    log_more = torch.special.log_ndtr(torch.where(right, -lower, upper))
    log_less = torch.special.log_ndtr(torch.where(right, -upper, lower))
    # the cell has some mass, whatever float32 rounds it to
    inside = log_more + torch.log(-torch.expm1((log_less - log_more).clamp(max=-torch.finfo(x.dtype).eps)))
    # the outermost cells are half-lines
    log_mass = torch.where(x > 1 - half, torch.special.log_ndtr(-lower), inside)
    log_mass = torch.where(x < -1 + half, torch.special.log_ndtr(upper), log_mass)
    return -log_mass.flatten(1).sum(1)
