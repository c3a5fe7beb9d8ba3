"""Noise that depends on the sample number alone, against noise that depends on what was drawn before."""

from functools import partial

import torch
from measure import Case, Clock, microseconds

from diffx.utils import Keys

SHAPES = ((64, 1, 8, 8), (128, 3, 32, 32))


def cases(quick: bool, clock: Clock) -> list[Case]:
    """One case per shape `[B, C, H, W]`."""
    return [_case(shape, quick, clock) for shape in SHAPES]


def _case(shape: tuple[int, ...], quick: bool, clock: Clock) -> Case:
    index = torch.arange(shape[0])
    calls = max(2, 400_000 // torch.Size(shape).numel())
    return Case(
        "noise, µs per call",
        str(list(shape)),
        {
            "torch.randn": microseconds(clock, partial(torch.randn, *shape), calls),
            # new keys every time, as in training
            "Keys.normal": microseconds(clock, lambda: Keys(0, index).normal("noise", *shape[1:]), calls),
        },
        rounds=3 if quick else 21,
    )
