"""What `trainer` says about speed: applied to the networks, checked, and, in a plan, tried out."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch

from diffx.backbones import speed_up
from diffx.training import DiffusionModule
from diffx.utils import DiffxError

Config = dict[str, Any]

HALF = "bf16-mixed"
"""The precision that a GPU since Ampere is fast in, with the range of float32."""


def switch_on(module: DiffusionModule, trainer: Config, device: torch.device | str, training: bool = True) -> None:
    """Applies the switches to the networks of a module, in place; names of weights and values stay as they are.

    Arguments:
        module: what is trained, or sampled.
        trainer: the config of the trainer; one of an older run may lack switches, which are off then.
        device: where the networks will run. What was compiled for training on a GPU is not compiled on a CPU.
        training: whether the denoiser is trained, or its averages sampled alone.
    """
    foreign = torch.device(device).type == "cpu" and trainer["accelerator"] in ("gpu", "cuda")
    layout = bool(trainer.get("channels_last", False)) and not foreign
    compiled = False if foreign else trainer["compile"]
    if training:
        checkpointing = trainer.get("activation_checkpointing", "none")
        speed_up(
            module.denoiser.backbone, compile=compiled, channels_last=layout, activation_checkpointing=checkpointing
        )
    for average in module.ema.named().values():
        # of the same layout as the weights, or their update would go through them one by one
        speed_up(average.backbone, compile=compiled, channels_last=layout)


def check_switches(config: Config) -> None:
    """Finds what would fail after the first step, or quietly be slow.

    Arguments:
        config: the whole config.

    Raises:
        DiffxError: if there is no compiler for `trainer.compile`, or the GPU has no bfloat16.
    """
    trainer, gpu = config["trainer"], torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"
    if trainer["compile"] and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise DiffxError("trainer.compile needs a C++ compiler; install one, such as g++, or set trainer.compile=false")
    if "bf16" in config["training"]["precision"] and gpu and not torch.cuda.is_bf16_supported(False):
        raise DiffxError(
            f"{torch.cuda.get_device_name()} has no bfloat16; set trainer.precision=16-mixed, or 32-true to be exact"
        )


def variants(config: Config, device: str) -> Iterator[tuple[str, Config]]:
    """A config with each switch that it leaves off and the device knows, by what is to be typed.

    Arguments:
        config: the whole config.
        device: where it would be trained, `cpu` or `cuda`.
    """
    trainer, gpu = config["trainer"], device == "cuda"
    for key, value, off in (
        ("precision", HALF, config["training"]["precision"] == "32-true"),
        ("channels_last", True, not trainer["channels_last"]),
        ("activation_checkpointing", "selective", trainer["activation_checkpointing"] == "none"),
        ("activation_checkpointing", "full", trainer["activation_checkpointing"] != "full"),
        # last, since the compiler stays in a process's memory
        ("compile", True, not trainer["compile"]),
        ("compile", "reduce-overhead", gpu and trainer["compile"] is True),
    ):
        if off:
            changed = deepcopy(config)
            changed["trainer"][key] = value
            if key == "precision":
                changed["training"]["precision"] = value
            yield f"trainer.{key}={str(value).lower()}", changed
