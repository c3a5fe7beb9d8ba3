r"""Guidance by a classifier of noisy samples.

Dhariwal and Nichol, *Diffusion Models Beat GANs on Image Synthesis* (arXiv 2105.05233), Sec. 4 and Alg. 2, add
w·∇ log p(y | x_t) to the score. By Tweedie's formula x̂ = (x_t + σ²·∇ log p(x_t))/α, hence

    x̂_guided = x̂ + w·(σ²/α)·∇_{x_t} log p(y | x_t).

The classifier is asked about u = x_t/r with r² = α² + σ², the same sample on the variance-preserving schedule of equal
logSNR, where ᾱ² = sigmoid(logSNR) and σ̄² = sigmoid(−logSNR), so that it serves every schedule. With ∇_{x_t} = ∇_u / r,
σ² = r²·σ̄² and α = r·ᾱ the scale r cancels:

    x̂_guided = x̂ + w·(σ̄²/ᾱ)·∇_u log p(y | u, logSNR).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser
from diffx.guidance.guided import device_of
from diffx.guidance.interval import EVERYWHERE, Interval, select
from diffx.schedules import NoiseLevel
from diffx.utils import DiffxError, expand_as


class ClassifierGuidance(Denoiser):
    r"""Classifier guidance: the estimate climbs the log-probability of the class that is asked for.

    x̂ + w·(σ²/α)·∇ log p(y | x_t), Dhariwal and Nichol (arXiv 2105.05233), Alg. 2, whose ε̂ = ε − w·σ·∇ log p(y | x_t) is
    the same; around an unconditional model w = 1 gives the conditional one. A label that the classifier does not know,
    such as the null label, has probability 1 and is not guided. Use it when the model was trained without classes or
    without dropping them, and a classifier can be trained (`diffx fit-classifier`).

    Arguments:
        denoiser: the denoiser that is guided; conditional or not.
        conditioner: says whether samples have labels.
        classifier: logits `[B, K]` of u `[B, *]` (variance-preserving, see this module) and logSNR `[B]`; each sample's
            depend on that sample alone.
        scale: w; 0 is unguided.
        interval: the σ/α within which to guide, [low, high]; None is everywhere.
        label: one class for all samples; None is each sample's own.

    Raises:
        DiffxError: if neither the samples nor `label` say which class is asked for.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        classifier: nn.Module,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
        label: int | None = None,
    ) -> None:
        super().__init__()
        if label is None and "label" not in conditioner.null(1):
            raise DiffxError(
                "classifier guidance has to be told the class, and the model is unconditional; set guidance.label=K to "
                "ask for class K"
            )
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.classifier = classifier.to(device_of(denoiser))
        self.scale = scale
        self.interval = Interval(interval)
        self.label = label
        self._known: tuple[float, float, float] | None = None  # r, logSNR and σ̄²/ᾱ, where the host knows the level

    def at(self, level: NoiseLevel) -> Denoiser:
        if isinstance(level.sigma, Tensor):  # samples at different levels: which are within is known when asked
            return self
        inner = self.denoiser.at(level)
        if level not in self.interval:
            return inner
        snr = math.exp(level.logsnr)
        known = (math.hypot(level.alpha, level.sigma), level.logsnr, 1 / math.sqrt(snr * (1 + snr)))
        return self.replaced(interval=EVERYWHERE, denoiser=inner, _known=known)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._guided(self.denoiser(x_t, t, **cond), x_t, t, cond)

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """The guided estimate, and v as it is."""
        x_hat, v = self.denoiser.posterior(x_t, t, s, **cond)
        return self._guided(x_hat, x_t, t, cond), v

    def _guided(self, x_hat: Tensor, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        label = cond.get("label") if self.label is None else torch.full((len(x_t),), self.label, device=x_t.device)
        rows = None if self.scale == 0 or label is None else self.interval.rows(self.schedule, t)
        if rows is None or label is None:
            return x_hat
        shift = self.scale * self._shift(x_t[rows], select(t, rows), label[rows])
        return x_hat + shift if isinstance(rows, slice) else x_hat.index_add(0, rows, shift)

    def _shift(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(σ̄²/ᾱ)·∇_u log p(y | u, logSNR), `[B, *]`."""
        if self._known is None:
            alpha, sigma = self.schedule(t)
            level = self.schedule.logsnr(t)
            r = expand_as((alpha**2 + sigma**2).sqrt(), x_t)
            factor = expand_as(torch.sigmoid(-level) / torch.sigmoid(level).sqrt(), x_t)
            logsnr = level.expand(len(x_t))
        else:
            r, level, factor = self._known
            logsnr = x_t.new_full((len(x_t),), level)
        return (factor * self._gradient(x_t / r, logsnr, label)).to(x_t.dtype)

    def _gradient(self, u: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        # differentiable once more where somebody differentiates the denoiser itself
        outer = torch.is_grad_enabled() and u.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            # copies, since what was made in inference mode cannot be differentiated through
            u = u if outer else u.detach().clone().requires_grad_()
            log_p = self.classifier(u, logsnr.clone()).log_softmax(dim=1)
            # one class more, of probability 1: whatever the classifier does not know
            log_p = torch.cat([log_p, torch.zeros_like(log_p[:, :1])], dim=1)
            chosen = log_p.gather(1, label.clamp(max=log_p.shape[1] - 1)[:, None])
            return torch.autograd.grad(chosen.sum(), u, create_graph=outer)[0]
