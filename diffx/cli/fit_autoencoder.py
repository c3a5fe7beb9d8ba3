"""`diffx fit-autoencoder`."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from diffx.autoencoders import KL, fit_kl
from diffx.cli.build import make
from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.sample import device_of
from diffx.data import DataSource
from diffx.utils import DiffxError

GROUPS = {"data": "digits", "optimizer": "adamw", "lr_schedule": "cosine"}
"""What can be chosen, with its default."""

KEYS: dict[str, Any] = {
    "out": None,
    "training": {"max_steps": 1000, "loss": "l1", "kl_weight": 1e-6},
    "seed": 0,
    "device": "auto",
    "progress_bar": True,
    "optimizer": {"lr": 2e-3},
    "autoencoder": {
        "_target_": "diffx.autoencoders.KL",
        "channels": "${data.channels}",
        "latent_channels": 4,
        "base": 16,
        "mult": [1, 2],
        "blocks": 1,
    },
}

_HELD_OUT = 2000


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    defaults: list[Any] = [*({group: choice} for group, choice in GROUPS.items()), "_self_"]
    ConfigStore.instance().store(name="diffx_fit_autoencoder", node=DictConfig({"defaults": defaults, **KEYS}))
    return fit(compose_config("diffx_fit_autoencoder", arguments.overrides, arguments.config_dirs))


def fit(config: dict[str, Any]) -> int:
    """Trains an autoencoder on the training split, saves it and returns the exit code."""
    console, training = Console(), config["training"]
    source: DataSource = make(config, "data")
    out = Path(config["out"] or f"{Path(source.name).name}-kl.safetensors").expanduser()
    if out.suffix != ".safetensors":
        raise DiffxError(f"out={out} must end in .safetensors")
    if training["loss"] not in ("l1", "mse"):
        raise DiffxError(f"training.loss={training['loss']} is neither l1 nor mse; choose one of them")
    device = device_of(config)
    torch.manual_seed(config["seed"])
    autoencoder: KL = make(config, "autoencoder")
    shape = autoencoder.latent_shape(source.channels, source.image_size)
    source.prepare()
    source.check()
    held_out = source.split("test")
    # spread over all of them: files are sorted by class
    some = torch.arange(min(len(held_out), _HELD_OUT)) * len(held_out) // min(len(held_out), _HELD_OUT)
    fit_kl(
        autoencoder,
        source.train_loader(config["seed"]),
        held_out.get(some)["x"],
        *(make(config, part) for part in ("optimizer", "lr_schedule")),
        max_steps=training["max_steps"],
        loss=training["loss"],
        kl_weight=training["kl_weight"],
        seed=config["seed"],
        device=device,
        progress=config["progress_bar"],
    )
    autoencoder.about["data"] = source.name
    autoencoder.save(out)
    console.print(
        f"PSNR {autoencoder.about['psnr']:.2f} dB on {len(some)} held-out images; {'x'.join(map(str, shape))} numbers "
        f"for {source.channels}x{source.image_size}x{source.image_size}: {out}\n"
        f"use it: diffx data encode SOURCE DEST autoencoder=kl autoencoder.weights={out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
