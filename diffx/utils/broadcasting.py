"""The one place where per-sample coefficients meet samples of any shape."""

from torch import Tensor


def expand_as(coefficient: Tensor, x: Tensor) -> Tensor:
    """Appends axes so that a coefficient of shape `[]` or `[B]` multiplies `x` of shape `[B, *]` sample by sample.

    Without it, `[B] * [B, D]` is silently wrong whenever B = D.

    Arguments:
        coefficient: one value, shape `[]`, or one value per sample, shape `[B]`.
        x: the samples, shape `[B, *]`.

    Returns:
        A view of the coefficient, shape `[]` or `[B, 1, …, 1]`.

    Raises:
        ValueError: if the shape is neither `[]` nor `[B]`.
    """
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim > 1 or coefficient.shape[0] != x.shape[0]:
        raise ValueError(
            f"a coefficient must have shape [] or [{x.shape[0]}] to go with samples of shape {list(x.shape)}, "
            f"but it has shape {list(coefficient.shape)}"
        )
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))
