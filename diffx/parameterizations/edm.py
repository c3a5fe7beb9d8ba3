"""EDM's preconditioning."""

import torch
from torch import Tensor

from diffx.parameterizations.base import Parameterization


class EDM(Parameterization):
    r"""EDM's preconditioning: input and target of unit variance, errors amplified as little as possible.

    With r² = α²·σ_d² + σ²: c_in = 1/r, c_skip = α·σ_d²/r², c_out = σ·σ_d/r. Karras et al. (arXiv 2206.00364), Table 1
    and App. B.6, where α = 1. Use it when noise levels span many orders of magnitude, as on schedule=edm.

    Arguments:
        sigma_data: σ_d, the standard deviation of the data, > 0.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_in = torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        return c_in, alpha * (self.sigma_data * c_in) ** 2, sigma * self.sigma_data * c_in
