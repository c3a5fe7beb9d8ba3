"""Progressive distillation's truncated weighting."""

from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class TruncatedSNR(Weighting):
    r"""The larger of the error of the noise estimate and that of x̂.

    w = max(SNR, 1), that is max(‖x̂ − x‖², ‖ε̂ − ε‖²). Salimans and Ho, *Progressive Distillation* (arXiv 2202.00512),
    Sec. 4. Equals `Unit` × ε where SNR ≥ 1 and `Unit` × x0 where SNR ≤ 1.

    Use it when the noisiest levels must keep a weight: where SNR → 0, as at the start of a few-step student.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return denoiser.schedule.logsnr(t).exp().clamp(min=1)
