"""`diffx fit-classifier`."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from diffx.autoencoders import Autoencoder
from diffx.cli.build import make
from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.sample import device_of
from diffx.data import DataSource
from diffx.guidance import NoisyClassifier, fit_noisy_classifier
from diffx.utils import DiffxError

GROUPS = {
    "data": "digits",
    "autoencoder": "pixels",
    "schedule": "cosine",
    "time_sampler": "stratified",
    "optimizer": "adamw",
    "lr_schedule": "cosine",
}
"""What can be chosen, with its default."""

KEYS: dict[str, Any] = {
    "out": None,
    "training": {"max_steps": 2000},
    "seed": 0,
    "device": "auto",
    "progress_bar": True,
    "optimizer": {"lr": 2e-3, "weight_decay": 0.05},
    "classifier": {
        "_target_": "diffx.guidance.NoisyClassifier",
        "num_classes": "${data.num_classes}",
        "width": 32,
        "dropout": 0.1,
    },
}


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    defaults: list[Any] = [*({group: choice} for group, choice in GROUPS.items()), "_self_"]
    ConfigStore.instance().store(name="diffx_fit_classifier", node=DictConfig({"defaults": defaults, **KEYS}))
    return fit(compose_config("diffx_fit_classifier", arguments.overrides, arguments.config_dirs))


def fit(config: dict[str, Any]) -> int:
    """Trains a classifier of noisy images on the training split, saves it and returns the exit code."""
    console = Console()
    source: DataSource = make(config, "data")
    if source.num_classes < 2:
        raise DiffxError(f"data={source.name} has no labels to train a classifier on; choose labelled data")
    out = Path(config["out"] or f"{Path(source.name).name}-noisy.safetensors").expanduser()
    if out.suffix != ".safetensors":
        raise DiffxError(f"out={out} must end in .safetensors")
    device = device_of(config)
    source.prepare()
    source.check()
    torch.manual_seed(config["seed"])
    autoencoder: Autoencoder = make(config, "autoencoder")
    channels, size, _ = autoencoder.latent_shape(source.channels, source.image_size)
    classifier: NoisyClassifier = make(config, "classifier", channels=channels, image_size=size)
    fit_noisy_classifier(
        classifier,
        source,
        autoencoder,
        *(make(config, part) for part in ("schedule", "time_sampler", "optimizer", "lr_schedule")),
        max_steps=config["training"]["max_steps"],
        seed=config["seed"],
        device=device,
        progress=config["progress_bar"],
    )
    classifier.save(out)
    shares = "  ".join(f"{level}: {share:.3f}" for level, share in classifier.about["accuracy"].items())
    console.print(
        f"held-out accuracy by logSNR  {shares or 'not known: there are no held-out images'}\nclassifier  {out}\n"
        f"use it: diffx sample run=DIR guidance=classifier guidance.classifier.weights={out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
