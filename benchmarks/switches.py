"""What the switches of `trainer` gain on this machine: a forward and a backward pass with each, over plain float32."""

from functools import partial
from typing import Any

import torch
from configured import backbone
from measure import Case, Clock, long_call
from torch import Tensor, nn

from diffx.backbones import speed_up

BATCH = 2
SWITCHES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {},
    "channels-last": {"channels_last": True},
    "checkpointing, selective": {"activation_checkpointing": "selective"},
    "checkpointing, full": {"activation_checkpointing": "full"},
    "compile": {"compile": True},
}


def cases(quick: bool, clock: Clock) -> list[Case]:
    """A transformer and a U-Net; channels-last for the latter alone."""
    small_dit = {"width": 32, "depth": 1, "heads": 2} if quick else {}
    small_unet = {"base": 32, "mult": [1, 2], "blocks": 1} if quick else {"dropout": 0.0}
    return [
        _case("dit_s_2", 4, 1000, small_dit, quick, clock),
        _case("ddpm_cifar10", 3, 10, small_unet, quick, clock),
    ]


def _case(name: str, channels: int, classes: int, changes: dict[str, Any], quick: bool, clock: Clock) -> Case:
    x, level = torch.randn(BATCH, channels, 32, 32), torch.zeros(BATCH)
    contenders = {}
    for switch, settings in SWITCHES.items():
        network = backbone(name, channels, 32, classes, **changes)
        if "channels_last" in settings and not any(p.ndim == 4 for p in network.parameters()):
            continue
        speed_up(network, **settings)
        contenders[switch] = long_call(clock, partial(step, network, x, level, switch == "bf16"), 1e3)
    return Case("switches, ms per forward and backward pass", f"{name} {list(x.shape)}", contenders, 1 if quick else 7)


def step(network: nn.Module, x: Tensor, level: Tensor, bf16: bool) -> None:
    """A forward and a backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = network(x, level)
    output.float().square().mean().backward()
    network.zero_grad()
