"""How two estimates become one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffx.utils import DiffxError, expand_as


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

    def for_trajectory(self) -> "Rule":
        """The rule for one trajectory of a batch; itself unless it remembers something from step to step."""
        return self


class Linear(Rule):
    r"""The straight line through both estimates.

    x̂ = x̂₋ + w·(x̂₊ − x̂₋). Ho and Salimans, *Classifier-Free Diffusion Guidance* (arXiv 2207.12598), Eq. 6, with their w
    one less. Use it when nothing speaks for another rule: it is what published guidance scales mean.
    """

    def __call__(self, positive: Tensor, guide: Tensor, scale: float) -> Tensor:
        return torch.lerp(guide, positive, scale)


class Projected(Rule):
    r"""Adaptive projected guidance: the part of the difference along the estimate is damped, its length bounded.

    x̂ = x̂₊ + (w − 1)·(Δ⊥ + η·Δ∥) with Δ = D·min(1, r/‖D‖), where Δ∥ is the projection of Δ on x̂₊, per sample, and
    Δ⊥ = Δ − Δ∥. D = x̂₊ − x̂₋ + β·D′ with D′ the D of the guide's last evaluation along the trajectory, 0 at first. Sadat
    et al., *Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models* (arXiv 2410.02416),
    Alg. 1. η = 1 with β = 0 and without r is `Linear`.

    Use it when a high guidance scale over-saturates: Δ∥ is what drives up contrast and colour.

    Arguments:
        eta: η, how much of the parallel part is kept, usually in [0, 1].
        norm_threshold: r > 0, the largest length of D over all dimensions of a sample (what is usual grows with the
            square root of their number); None is unbounded.
        momentum: β ∈ (−1, 1), negative in the paper: the difference is pushed away from where it has pointed. The
            result then depends on which samples were asked before, that is on the sampler's stages and steps.

    Raises:
        DiffxError: if β is no such number, or not 0 where there are no steps before: for likelihoods, and for samplers
            that choose the steps of each sample.
    """

    def __init__(self, eta: float = 0.0, norm_threshold: float | None = None, momentum: float = 0.0) -> None:
        if not -1 < momentum < 1:
            raise DiffxError(
                f"guidance.rule.momentum is {momentum}; give a number between -1 and 1, such as -0.5, or 0 for none"
            )
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self._before: Tensor | float | None = None

    def for_trajectory(self) -> "Projected":
        if self.momentum == 0:
            return self
        rule = Projected(self.eta, self.norm_threshold, self.momentum)
        rule._before = 0.0
        return rule

    def __call__(self, positive: Tensor, guide: Tensor, scale: float) -> Tensor:
        delta, onto = (positive - guide).flatten(1), positive.flatten(1)
        if self.momentum != 0:
            delta = self._before = delta + self.momentum * self._remembered(delta)
        if self.norm_threshold is not None:
            length = delta.norm(dim=1, keepdim=True)
            delta = delta * (self.norm_threshold / length.clamp(min=self.norm_threshold))
        onto = torch.nn.functional.normalize(onto, dim=1)
        parallel = (delta * onto).sum(dim=1, keepdim=True) * onto
        update = delta - (1 - self.eta) * parallel
        return positive + (scale - 1) * update.view_as(positive)

    def _remembered(self, delta: Tensor) -> Tensor | float:
        if self._before is None or (isinstance(self._before, Tensor) and self._before.shape != delta.shape):
            raise DiffxError(
                f"guidance.rule.momentum={self.momentum} needs a sampler that takes all samples through the same "
                "steps; set it to 0, or take another sampler than adaptive"
            )
        return self._before


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
