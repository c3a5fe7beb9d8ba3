"""Denoisers known exactly, against which everything else is held."""

import math

import torch
from torch import Tensor

from diffx.denoisers.base import Denoiser
from diffx.schedules import LOGSNR_MAX, Schedule
from diffx.utils import expand_as


class GaussianMixture(Denoiser):
    r"""The exact denoiser of data from a mixture of axis-aligned Gaussians; one component is a Gaussian.

    With x ~ Σ_k π_k N(μ_k, diag s_k²), x_t is a mixture of N(α·μ_k, α²·s_k² + σ²), and E[x | x_t] averages the
    components' posterior means with their posterior weights. Use it when something is to be held against the truth.

    Arguments:
        means: μ, shape `[K, D]`.
        stds: s, shape `[K, D]`, ≥ 0.
        weights: π, shape `[K]`, summing to 1; equal by default.
        schedule: the forward process.
    """

    def __init__(self, means: Tensor, stds: Tensor, schedule: Schedule, weights: Tensor | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("means", means)
        self.register_buffer("stds", stds.expand_as(means).clone())
        weights = means.new_ones(len(means)) / len(means) if weights is None else weights.to(means)
        self.register_buffer("log_weights", weights.log())
        self.means: Tensor
        self.stds: Tensor
        self.log_weights: Tensor

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """x̂ `[B, D]` of x_t `[B, D]`; with `label` int64 `[B]` that of the component asked for, K meaning any."""
        return self._moments(x_t, t, **cond)[0]

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ and the v of the exact variance of x_s given x_t, β̃·(1 + (SNR_s − SNR_t)·Var[x | x_t])."""
        x_hat, variance = self._moments(x_t, t, **cond)
        gain = self.schedule.logsnr(s).exp() - self.schedule.logsnr(t).exp()
        # log β/β̃, where σ_s may be 0
        log_ratio = 2 * (self.schedule(t)[1].log() - self.schedule(s)[1].log().clamp(min=-LOGSNR_MAX / 2))
        return x_hat, torch.log1p(expand_as(gain, x_t) * variance) / expand_as(log_ratio, x_t)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The log-density of x_t `[B, D]` at time t, in nats, shape `[B]`."""
        alpha, sigma = (expand_as(c, x_t).unsqueeze(-1) if c.ndim else c for c in self.schedule(t))
        return self._components(x_t, alpha, sigma)[0].logsumexp(dim=1)

    def sample(self, x: Tensor, component: Tensor) -> Tensor:
        """Data from standard normal numbers x `[B, D]` and uniform numbers `component` `[B]` in (0, 1)."""
        edges = self.log_weights.exp().cumsum(0)
        k = torch.bucketize(component.to(edges.dtype), edges[:-1])
        return self.means[k] + self.stds[k] * x

    def _moments(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x given x_t, axis by axis, each `[B, D]`."""
        alpha, sigma = (expand_as(c, x_t).unsqueeze(-1) if c.ndim else c for c in self.schedule(t))
        logits, variance = self._components(x_t, alpha, sigma)
        if "label" in cond:
            logits = _restrict(logits, cond["label"])
        posterior = logits.softmax(dim=1)[..., None]
        means = self.means + alpha * self.stds**2 / variance * (x_t[:, None] - alpha * self.means)
        mean = (posterior * means).sum(dim=1)
        within = (self.stds * sigma) ** 2 / variance
        return mean, (posterior * (within + (means - mean[:, None]) ** 2)).sum(dim=1)

    def _components(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The logits log π_k + log N(x_t; …), `[B, K]`, and the variances of x_t given k, `[K, D]` or `[B, K, D]`."""
        variance = (alpha * self.stds) ** 2 + sigma**2
        residual = x_t[:, None] - alpha * self.means
        log_normal = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi))
        return self.log_weights + log_normal.sum(dim=-1), variance


def _restrict(logits: Tensor, label: Tensor) -> Tensor:
    """Component logits `[B, K]` with all but the labelled component excluded; label K excludes none."""
    number = logits.shape[1]
    others = torch.arange(number, device=label.device) != label[:, None]
    return logits.masked_fill(others & (label[:, None] < number), -torch.inf)
