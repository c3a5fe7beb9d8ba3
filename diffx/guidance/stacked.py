"""Several guidances at once."""

from collections.abc import Callable

from diffx.conditioning import Conditioner
from diffx.denoisers import Denoiser

Guidance = Callable[[Denoiser, Conditioner], Denoiser]
"""What `configs/guidance/*.yaml` build: it puts a denoiser around a denoiser."""


def stacked(denoiser: Denoiser, conditioner: Conditioner, **parts: Guidance) -> Denoiser:
    """Several guidances, each around the one before.

    g_n(… g_2(g_1(x̂))): guidance is a denoiser around a denoiser, so that it goes around another one as well. Use it
    when one guidance is not enough: classifier-free guidance corrected by autoguidance, or helped by a classifier.

    Arguments:
        denoiser: the denoiser that is guided.
        conditioner: gives the null conditions.
        parts: the guidances, the innermost first, under names of the user's choice; none leaves the denoiser as it is.

    Returns:
        The outermost denoiser.
    """
    for part in parts.values():
        denoiser = part(denoiser, conditioner)
    return denoiser
