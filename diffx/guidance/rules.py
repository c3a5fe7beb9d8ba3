"""How two estimates become one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffx.utils import expand_as


class Rule(ABC):
    """A function of an estimate, that of its guide, and a scale; at scale 1 it is the estimate."""

    @abstractmethod
    def __call__(self, positive: Tensor, guide: Tensor, scale: float) -> Tensor:
        """The guided estimate.

        Arguments:
            positive: x̂₊, the estimate that is to be strengthened, `[B, *]`.
            guide: x̂₋, the estimate to move away from, `[B, *]`.
            scale: w; 1 is x̂₊ for every rule.

        Returns:
            x̂, `[B, *]`.
        """


class Linear(Rule):
    r"""The straight line through both estimates.

    x̂ = x̂₋ + w·(x̂₊ − x̂₋). Ho and Salimans, *Classifier-Free Diffusion Guidance* (arXiv 2207.12598), Eq. 6, with their w
    one less. Use it when nothing speaks for another rule: it is what published guidance scales mean.
    """

    def __call__(self, positive: Tensor, guide: Tensor, scale: float) -> Tensor:
        return torch.lerp(guide, positive, scale)


class Projected(Rule):
    r"""Adaptive projected guidance: the part of the difference along the estimate is damped, its length bounded.

    x̂ = x̂₊ + (w − 1)·(Δ⊥ + η·Δ∥) with Δ = (x̂₊ − x̂₋)·min(1, r/‖x̂₊ − x̂₋‖), where Δ∥ is the projection of Δ on x̂₊, per
    sample, and Δ⊥ = Δ − Δ∥. Sadat et al., *Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models* (arXiv 2410.02416), Alg. 1. η = 1 without r is `Linear`.

    The momentum β of the paper is 0 here and cannot be set: it mixes the differences of the sampler's earlier steps
    into Δ, and a denoiser is a function of x_t and t alone, whichever solver asks and however often per step.

    Use it when a high guidance scale over-saturates: Δ∥ is what drives up contrast and colour.

    Arguments:
        eta: η, how much of the parallel part is kept, usually in [0, 1].
        norm_threshold: r > 0, the largest length of the difference over all dimensions of a sample (what is usual grows
            with the square root of their number); None is unbounded.
    """

    def __init__(self, eta: float = 0.0, norm_threshold: float | None = None) -> None:
        self.eta = eta
        self.norm_threshold = norm_threshold

    def __call__(self, positive: Tensor, guide: Tensor, scale: float) -> Tensor:
        delta, onto = (positive - guide).flatten(1), positive.flatten(1)
        if self.norm_threshold is not None:
            length = delta.norm(dim=1, keepdim=True)
            delta = delta * (self.norm_threshold / length.clamp(min=self.norm_threshold))
        onto = torch.nn.functional.normalize(onto, dim=1)
        parallel = (delta * onto).sum(dim=1, keepdim=True) * onto
        update = delta - (1 - self.eta) * parallel
        return positive + (scale - 1) * update.view_as(positive)


def rescaled(x_hat: Tensor, positive: Tensor, phi: float) -> Tensor:
    r"""The guided estimate with the contrast of the unguided one, in part.

    φ·(std(x̂₊)/std(x̂))·x̂ + (1 − φ)·x̂, the standard deviations over all dimensions of a sample. Lin et al., *Common
    Diffusion Noise Schedules and Sample Steps are Flawed* (arXiv 2305.08891), Sec. 3.4, there of the network's output,
    here of x̂ whatever the parameterization.

    Arguments:
        x_hat: the guided estimate, `[B, *]`.
        positive: x̂₊, `[B, *]`.
        phi: φ ∈ [0, 1]; 0 changes nothing.

    Returns:
        The rescaled estimate, `[B, *]`.
    """
    std, std_positive = (value.flatten(1).std(dim=1, correction=0) for value in (x_hat, positive))
    # a constant image has no contrast that could be changed
    ratio = torch.where(std > 0, std_positive / std, 1.0)
    return expand_as(phi * ratio + (1 - phi), x_hat) * x_hat
