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


def xavier(layer: nn.Linear) -> nn.Linear:
    """The layer with a Xavier-uniform weight and a zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
