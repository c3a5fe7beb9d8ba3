"""The affine map from the network's output to the denoised estimate."""

from abc import ABC, abstractmethod

from torch import Tensor


class Parameterization(ABC):
    r"""x̂ = c_skip·x_t + c_out·F(c_in·x_t, logSNR), with F the network.

    Karras et al. (arXiv 2206.00364), Eq. 7, extended to any α: every prediction target of the literature is a choice of
    (c_in, c_skip, c_out). Given for a schedule with any α and σ; where α² + σ² = 1, or α + σ = 1, the formulas become
    those of the papers.
    """

    @abstractmethod
    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients at a noise level.

        Arguments:
            alpha: α of the schedule, any shape.
            sigma: σ of the schedule, the same shape.

        Returns:
            c_in, c_skip and c_out, each of that shape. Infinite where the parameterization is undefined.
        """
