"""What exponential integrators share: the φ-functions, and polynomials through past estimates.

Everything here takes numbers, or tensors where each sample has its own time.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TERMS = 18
"""Terms of the power series: with |h| < 1 the rest is below float64's rounding."""

RECIPROCAL = [1 / math.factorial(n) for n in range(TERMS + 8)]
"""1/n!."""


def exp(value: float | Tensor) -> Any:
    """The exponential of a number or a tensor."""
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def phi(k: int, h: float | Tensor) -> Any:
    r"""φ_k(h) = ∫₀¹ e^{(1−u)·h}·u^{k−1}/(k−1)! du: φ_1 = (e^h − 1)/h and φ_{k+1} = (φ_k − 1/k!)/h.

    Hochbruck and Ostermann, *Exponential integrators* (Acta Numerica 2010), Eq. 2.10. The recursion loses k digits of
    a small h, where the power series is taken instead.

    Arguments:
        k: ≥ 1.
        h: any value, a number or a tensor.

    Returns:
        φ_k(h), like h.
    """
    if isinstance(h, Tensor):
        return torch.where(h.abs() < 1, _series(k, h), _recursion(k, h))
    return _series(k, h) if abs(h) < 1 else _recursion(k, h)


def _series(k: int, h: Any) -> Any:
    value = 0.0
    for j in reversed(range(TERMS)):
        value = value * h + RECIPROCAL[j + k]
    return value


def _recursion(k: int, h: Any) -> Any:
    value = exp(h)
    for j in range(k):
        value = (value - RECIPROCAL[j]) / h
    return value


def moments(h: float | Tensor, count: int) -> list[Any]:
    """∫₀¹ h·e^{(u−1)·h}·u^i du for i < count: the moments of x̂'s share in a step of h in log(α/σ)."""
    return [h * math.factorial(i) * phi(i + 1, -h) for i in range(count)]


def weights(nodes: Sequence[Any], moments: Sequence[Any]) -> list[Any]:
    """The weights w with Σ_j w_j·p(u_j) = L(p) for all polynomials p of less degree than there are nodes.

    Arguments:
        nodes: u_j, distinct.
        moments: L(u^i), at least as many as nodes.

    Returns:
        w_j, one per node: L of the Lagrange polynomials.
    """
    result = []
    for j, node in enumerate(nodes):
        polynomial: list[Any] = [1.0]  # coefficients, constant first, of ∏_{k≠j} (u − u_k)/(u_j − u_k)
        for other in (u for k, u in enumerate(nodes) if k != j):
            terms = zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)
            polynomial = [(lower - other * same) / (node - other) for lower, same in terms]
        result.append(sum(c * moment for c, moment in zip(polynomial, moments, strict=False)))
    return result
