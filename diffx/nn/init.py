"""Initialisations, as wrappers around the layer they initialise."""

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def zeros(layer: Layer) -> Layer:
    """The layer with weight and bias zero, so that the branch it closes starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def xavier(layer: Layer, gain: float = 1.0) -> Layer:
    """The layer with a Xavier-uniform weight, times `gain`, and a zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
