r"""Weightings w(t) of the loss w·‖x̂ − x‖², all in x̂-space.

A change of parameterization alone therefore never changes the objective, with one exception that users expect: `Unit`
is the mean squared error in the parameterization's own output space. With SNR = α²/σ², these coincide:

| weighting | in x̂-space | is also |
|---|---|---|
| `SNR` | SNR | `Unit` × ε, DDPM's L_simple; `P2` with γ = 0 |
| `Constant` | 1 | `Unit` × x0 |
| `EDM` with σ_d = 1 | SNR + 1 | `Unit` × v |
| `EDM` | SNR + 1/σ_d² | `Unit` × EDM with the same σ_d |
| `FlowMatching` | (1 + √SNR)²; 1/t² on the flow schedule | `Unit` × flow |
| `TruncatedSNR` | max(SNR, 1) | `Unit` × ε where SNR ≥ 1, `Unit` × x0 elsewhere |
| `MinSNR` | min(SNR, γ) | `Unit` × ε where SNR ≤ γ |
| `SoftMinSNR` | 1/(1/SNR + 1/γ) | `Sigmoid` with b = log γ; γ·`P2` with k = γ and its exponent 1 |
| `Sigmoid` | SNR·sigmoid(b − logSNR) | `Unit` × ε as b → ∞ |
| `ELBO` | −½·dSNR/dt | `OverLogSNR` of `SNR` |
| `LearnedUncertainty` | w₀·e^{−u}, plus u | w₀ at the start of training |

`Unit` × v is so on every schedule, since `V` is defined by the variance-preserving scaling of x_t.
"""

from diffx.weightings.base import Weighting
from diffx.weightings.constant import Constant
from diffx.weightings.elbo import ELBO, OverLogSNR
from diffx.weightings.flow_matching import FlowMatching
from diffx.weightings.learned_uncertainty import LearnedUncertainty
from diffx.weightings.p2 import P2
from diffx.weightings.sigmoid import Sigmoid
from diffx.weightings.snr import EDM, SNR, MinSNR
from diffx.weightings.soft_min_snr import SoftMinSNR
from diffx.weightings.truncated_snr import TruncatedSNR
from diffx.weightings.unit import Unit

__all__ = [
    "EDM",
    "ELBO",
    "P2",
    "SNR",
    "Constant",
    "FlowMatching",
    "LearnedUncertainty",
    "MinSNR",
    "OverLogSNR",
    "Sigmoid",
    "SoftMinSNR",
    "TruncatedSNR",
    "Unit",
    "Weighting",
]
