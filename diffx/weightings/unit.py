"""The mean squared error of the network's own output."""

from torch import Tensor

from diffx.denoisers import Preconditioned
from diffx.weightings.base import Weighting


class Unit(Weighting):
    r"""The mean squared error of the network's own output.

    w = 1/c_out²: the network's squared error counts equally at every noise level. DDPM's L_simple for ε (Ho et al.,
    arXiv 2006.11239, Eq. 14), and in the same way for every other parameterization: the objective follows it.

    Use it when a paper says "MSE on the prediction target" and nothing else.
    """

    def forward(self, denoiser: Preconditioned, t: Tensor) -> Tensor:
        return denoiser.coefficients(t).c_out ** -2
