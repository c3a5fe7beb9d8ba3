"""The average of the weights that is evaluated and saved."""

import copy

import torch
from torch import Tensor, nn

from diffx.denoisers import Preconditioned


class EMA(nn.Module):
    r"""θ̄ ← d·θ̄ + (1 − d)·θ after every optimizer step, in a copy that is never swapped with the weights in training.

    Polyak and Juditsky, 1992; Ho et al. (arXiv 2006.11239), App. B. With warm-up d = min(decay, (1 + n)/(10 + n)) at
    update n, so that the average forgets its initialisation.

    Arguments:
        denoiser: the denoiser in training; copied, its learned schedule included.
        decay: d ∈ [0, 1).
        warmup: whether d rises to `decay`.
    """

    def __init__(self, denoiser: Preconditioned, decay: float = 0.9999, warmup: bool = True) -> None:
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self.denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, denoiser: Preconditioned, n: int) -> None:
        """Takes the weights of update n ≥ 1 in.

        Arguments:
            denoiser: the denoiser in training, of the structure of the copy.
            n: the number of optimizer steps done.
        """
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        # one fused call over all tensors instead of one per parameter
        averages: list[Tensor] = [*self.denoiser.parameters()]
        weights: list[Tensor] = [*denoiser.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, current in zip(self.denoiser.buffers(), denoiser.buffers(), strict=True):
            average.copy_(current)
