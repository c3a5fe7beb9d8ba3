"""Held-out splits that are the same on every machine."""

import torch
from torch import Tensor

from diffx.utils import Keys


def held_out(labels: Tensor, identity: Tensor, count: int) -> Tensor:
    """Chooses a stratified held-out set: from each class its share, by largest remainders.

    Arguments:
        labels: the class of each image, int64 `[N]`.
        identity: a number for each image, int64 `[N]`; whether an image is held out depends on its number, and on the
            others' only through the size of its class's share, so that images added later move few of the old ones.
        count: how many to hold out.

    Returns:
        Which images are held out, bool `[N]`, `count` of them.
    """
    sizes = labels.bincount()
    shares = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    # the seed is part of the definition of the split, not of the run
    draws = Keys(0, identity).uniform("held_out", dtype=torch.float64)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = (labels == label).nonzero()[:, 0]
        chosen[members[draws[members].argsort(stable=True)[:share]]] = True
    return chosen
