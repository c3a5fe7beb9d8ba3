"""A schedule given as a table of its discrete steps."""

from collections.abc import Sequence

import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from diffx.schedules.base import Schedule
from diffx.utils import DiffxError


class Tabulated(Schedule):
    r"""A schedule through a table of discrete steps, variance preserving.

    At t = i/T exactly ᾱ_i = ∏_{j ≤ i} (1 − β_j), with ᾱ_0 = 1 (Ho et al., arXiv 2006.11239, Eq. 4). Between the steps
    log ᾱ is a monotone cubic (Fritsch and Butland, *A Method for Constructing Local Monotone Piecewise Cubic
    Interpolants*, 1984), whose continuous slope lets solvers of the probability-flow ODE keep their order. Use it when
    a published model comes with a table of its own.

    Arguments:
        betas: β_1 … β_T, each in (0, 1); or give
        alphas_cumprod: ᾱ_1 … ᾱ_T, decreasing, each in (0, 1).

    Raises:
        DiffxError: if not exactly one of them is given, or a value lies outside its range.
    """

    def __init__(
        self, betas: Sequence[float] | Tensor | None = None, alphas_cumprod: Sequence[float] | Tensor | None = None
    ) -> None:
        super().__init__()
        if (betas is None) == (alphas_cumprod is None):
            raise DiffxError("a table is given by schedule.betas or by schedule.alphas_cumprod; give one and not both")
        if betas is not None:
            table = _numbers(betas, "betas")
            if not ((table > 0) & (table < 1)).all():
                raise DiffxError("schedule.betas must be a list of numbers between 0 and 1, both excluded")
            log_alpha_bar = torch.log1p(-table).cumsum(0)
        else:
            table = _numbers(alphas_cumprod, "alphas_cumprod")
            if not ((table > 0) & (table < 1)).all() or (table.diff() >= 0).any():
                raise DiffxError(
                    "schedule.alphas_cumprod must be a decreasing list of numbers between 0 and 1, both excluded; "
                    "for an end at 0 wrap it with schedule=zero_snr"
                )
            log_alpha_bar = table.log()
        log_alpha_bar = torch.cat([log_alpha_bar.new_zeros(1), log_alpha_bar])
        steps = len(table)
        # a single step has no neighbours to take a slope from
        slope = (
            PchipInterpolator(range(steps + 1), log_alpha_bar.numpy()).derivative()(range(steps + 1))
            if steps > 1
            else [log_alpha_bar[1].item()] * 2
        )
        self.register_buffer("log_alpha_bar", log_alpha_bar, persistent=False)
        self.register_buffer("slope", torch.as_tensor(slope, dtype=torch.float64), persistent=False)
        self.log_alpha_bar: Tensor
        self.slope: Tensor

    @classmethod
    def ddpm(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "Tabulated":
        """DDPM's table: β linear from 10⁻⁴ to 0.02 in 1000 steps (Ho et al., arXiv 2006.11239, Sec. 4).

        Arguments:
            steps: T, ≥ 1.
            beta_start: β_1.
            beta_end: β_T.
        """
        return cls(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        steps = len(self.log_alpha_bar) - 1
        position = t.to(torch.float64) * steps
        i = position.detach().long().clamp(0, steps - 1)
        u = position - i
        # cubic Hermite interpolation, written from the node so that ᾱ(0) = 1 loses no digits
        rise = self.log_alpha_bar[i + 1] - self.log_alpha_bar[i]
        at, ahead = self.slope[i], self.slope[i + 1]
        log_alpha_bar = self.log_alpha_bar[i] + u * (at + u * (3 * rise - 2 * at - ahead + u * (at + ahead - 2 * rise)))
        log_alpha_bar = log_alpha_bar.to(t.dtype)
        return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))


def _numbers(values: Sequence[float] | Tensor | None, name: str) -> Tensor:
    table = torch.as_tensor(values, dtype=torch.float64)
    if table.ndim != 1 or len(table) == 0:
        raise DiffxError(f"schedule.{name} must be a list of numbers between 0 and 1, both excluded")
    return table
