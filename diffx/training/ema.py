"""The averages of the weights that are evaluated and saved."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffx.denoisers import Preconditioned
from diffx.utils import DiffxError


class EMA(nn.Module):
    r"""θ̄ ← d·θ̄ + (1 − d)·θ after every optimizer step, in copies that are never swapped with the weights in training.

    Polyak and Juditsky, 1992; Ho et al. (arXiv 2006.11239), App. B. With warm-up d = min(decay, (1 + n)/(10 + n)) at
    update n, so that the average forgets its initialisation.

    Arguments:
        denoiser: the denoiser in training; copied, its learned schedule included.
        decay: d ∈ [0, 1); or several, each with a copy of its own, of which the first is the one evaluated by default.
        warmup: whether d rises to `decay`.

    Attributes:
        denoiser: the average of the first decay.

    Raises:
        DiffxError: if there is no decay, one twice, or one out of its range.
    """

    def __init__(self, denoiser: Preconditioned, decay: float | Sequence[float] = 0.9999, warmup: bool = True) -> None:
        super().__init__()
        self.decays = [decay] if isinstance(decay, int | float) else list(decay)
        if not self.decays or len({*self.decays}) < len(self.decays) or not all(0 <= d < 1 for d in self.decays):
            raise DiffxError(f"ema.decay is {decay}; give a number in [0, 1), or a list of different ones")
        self.warmup = warmup

        def average() -> Preconditioned:
            return copy.deepcopy(denoiser).eval().requires_grad_(False)

        self.denoiser = average()
        self.others = nn.ModuleList(average() for _ in self.decays[1:])

    def named(self) -> dict[str, Preconditioned]:
        """The averages by the names of their files: `ema`, and `ema_<decay>` for each further decay."""
        others = (f"ema_{decay:g}" for decay in self.decays[1:])
        copies = cast("list[Preconditioned]", list(self.others))
        return {"ema": self.denoiser, **dict(zip(others, copies, strict=True))}

    @torch.no_grad()
    def update(self, denoiser: Preconditioned, n: int) -> None:
        """Takes the weights of update n ≥ 1 in.

        Arguments:
            denoiser: the denoiser in training, of the structure of the copies.
            n: the number of optimizer steps done.
        """
        weights: list[Tensor] = [*denoiser.parameters()]
        for decay, copied in zip(self.decays, self.named().values(), strict=True):
            d = min(decay, (1 + n) / (10 + n)) if self.warmup else decay
            # one fused call over all tensors instead of one per parameter
            averages: list[Tensor] = [*copied.parameters()]
            torch._foreach_lerp_(averages, weights, 1 - d)  # pyright: ignore[reportPrivateImportUsage]
            for average, current in zip(copied.buffers(), denoiser.buffers(), strict=True):
                average.copy_(current)
