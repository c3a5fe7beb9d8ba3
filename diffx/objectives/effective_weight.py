r"""What a training objective weighs: times are a detail of how it is written, noise levels are not.

With times from a density p(t) and weights w in x̂-space, the loss E_t[w·‖x̂ − x‖²] is the integral over λ = logSNR of
W(λ)·‖ε̂ − ε‖² with the effective weight W(λ) = p(λ)·w/SNR, since ‖ε̂ − ε‖² = SNR·‖x̂ − x‖². Kingma and Gao,
*Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation* (arXiv 2303.00848), Eq. 9: two arms with
one W over one range of λ minimise the same loss, whatever schedule, density, weighting and parameterization wrote it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.time_samplers import TimeSampler
from diffx.utils import Keys
from diffx.weightings import Weighting

_POINTS = 8192


@dataclass(frozen=True)
class EffectiveWeight:
    """W over logSNR.

    Arguments:
        logsnr: λ, increasing, float64 `[M]`.
        weight: W(λ) ≥ 0, float64 `[M]`.
    """

    logsnr: Tensor
    weight: Tensor

    def at(self, logsnr: Tensor) -> Tensor:
        """W at other λ, interpolated linearly; NaN outside the range, float64 of the shape of `logsnr`."""
        k = torch.searchsorted(self.logsnr, logsnr.to(torch.float64)).clamp(1, len(self.logsnr) - 1)
        low, high = self.logsnr[k - 1], self.logsnr[k]
        share = (logsnr - low) / (high - low)
        value = torch.lerp(self.weight[k - 1], self.weight[k], share)
        outside = (logsnr < self.logsnr[0]) | (logsnr > self.logsnr[-1])
        return torch.where(outside, torch.nan, value)

    def factor(self, other: "EffectiveWeight", tolerance: float = 0.03) -> float | None:
        """The constant c with W = c·W_other over one range of λ, or None where there is none.

        Arguments:
            other: what to compare with.
            tolerance: the largest relative deviation of W/W_other from a constant, and of one range from the other.
        """
        ends = [(w.logsnr[0].item(), w.logsnr[-1].item()) for w in (self, other)]
        low, high = max(e[0] for e in ends), min(e[1] for e in ends)
        width = max(e[1] - e[0] for e in ends)
        if high - low < (1 - tolerance) * width:
            return None
        # what little lies in the tails is known to fewer digits
        grid = torch.linspace(low, high, 402, dtype=torch.float64)[4:-4]
        log_ratio = self.at(grid).log() - other.at(grid).log()
        log_ratio = log_ratio[log_ratio.isfinite()]
        if not len(log_ratio) or log_ratio.max() - log_ratio.min() > 2 * tolerance:
            return None
        return math.exp(log_ratio.median().item())


@torch.no_grad()
def effective_weight(denoiser: Preconditioned, time_sampler: TimeSampler, weighting: Weighting) -> EffectiveWeight:
    """W of an objective at the start of training, by quadrature.

    Arguments:
        denoiser: the model; schedule and parameterization are read, the network is not called.
        time_sampler: the density of the training times.
        weighting: w(t), in x̂-space.
    """
    t, correction = time_sampler(denoiser.schedule, _Quantiles())
    t = t.to(torch.float64)
    logsnr, order = denoiser.schedule.logsnr(t).sort()
    value = (weighting(denoiser, t) * correction / denoiser.schedule.logsnr(t).exp())[order]
    # between neighbours lies a share 1/n of the density; a bounded logSNR repeats its last value
    keep = torch.cat([torch.tensor([True]), logsnr.diff() > 1e-9])
    logsnr, value = logsnr[keep], value[keep]
    density = 1 / (_POINTS * logsnr.diff())
    middle = (logsnr[1:] + logsnr[:-1]) / 2
    # the geometric mean: where quantiles lie far apart, weights differ by factors
    return EffectiveWeight(middle, density * (value[1:] * value[:-1]).sqrt())


@torch.no_grad()
def effective_weight_of_steps(
    denoiser: Preconditioned, time_sampler: TimeSampler, weighting: Weighting, steps: int
) -> EffectiveWeight:
    """W of an objective whose times are rounded up to multiples of 1/T, at which it is a sum: as if it were not one.

    Arguments:
        denoiser: the model.
        time_sampler: the density of the training times.
        weighting: w(t), in x̂-space.
        steps: T.
    """
    whole = effective_weight(denoiser, time_sampler, weighting)
    cleanest = denoiser.schedule.logsnr(torch.tensor(1 / steps, dtype=torch.float64, device=denoiser.schedule.device))
    kept = whole.logsnr <= cleanest.item()
    return EffectiveWeight(whole.logsnr[kept], whole.weight[kept])


@torch.no_grad()
def effective_weight_of_bound(denoiser: Preconditioned, logsnr_max: float, dimensions: int) -> EffectiveWeight:
    """W of the variational bound in nats: one number, whatever the schedule.

    With t uniform, p(λ) = |dt/dλ| and w = −½·dSNR/dt summed over the dimensions, hence W = ½ for each of them: uniform
    weighting is the bound (Kingma and Gao, arXiv 2303.00848). Its two end terms have no gradient in the network.

    Arguments:
        denoiser: the model; only the ends of its schedule are read.
        logsnr_max: the clean end, unless the schedule ends before.
        dimensions: the number of dimensions of a sample: W is that of a mean over them.
    """
    low, high = denoiser.schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64, device=denoiser.schedule.device))
    logsnr = torch.linspace(low.item(), min(high.item(), logsnr_max), 402, dtype=torch.float64)
    return EffectiveWeight(logsnr, torch.full_like(logsnr, dimensions / 2))


class _Quantiles(Keys):
    """Evenly spaced numbers in the place of random ones: a density's quantiles."""

    def __init__(self) -> None:
        super().__init__(0, torch.arange(_POINTS))

    def uniform(self, stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = (self.index.to(torch.float64) + 0.5) / _POINTS
        return value.reshape(-1, *(1 for _ in shape)).expand(-1, *shape)

    def normal(self, stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.special.ndtri(self.uniform(stream, *shape))
