r"""Weightings w(t) of the loss w·‖x̂ − x‖², all in x̂-space.

A change of parameterization alone therefore never changes the objective, with one exception that users expect: `Unit`
is the mean squared error in the parameterization's own output space. With SNR = α²/σ², these pairs coincide:

| weighting | in x̂-space | is |
|---|---|---|
| `Unit` × ε | SNR | DDPM's L_simple |
| `Unit` × x0 | 1 | `x0`-prediction's MSE |
| `Unit` × v (variance preserving) | SNR + 1 | progressive distillation's SNR + 1 |
| `Unit` × flow (flow schedule) | 1/t² = SNR·(1 + 1/√SNR)² | flow matching's L_FM |
| `Unit` × EDM (α = 1) = `EDM` | SNR + 1/σ_d² | EDM's λ(σ) |
"""

from diffx.weightings.base import Weighting
from diffx.weightings.snr import EDM, SNR, MinSNR
from diffx.weightings.unit import Unit

__all__ = ["EDM", "SNR", "MinSNR", "Unit", "Weighting"]
