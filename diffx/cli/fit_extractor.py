"""`diffx fit-extractor`."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from diffx.cli.build import make
from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.data import DataSource
from diffx.data.base import SplitName
from diffx.metrics import fit_classifier
from diffx.utils import DiffxError

KEYS: dict[str, Any] = {"out": None, "min_accuracy": 0.97, "epochs": None, "seed": 0}


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    ConfigStore.instance().store(
        name="diffx_fit_extractor", node=DictConfig({"defaults": [{"data": "digits"}, "_self_"], **KEYS})
    )
    return fit(compose_config("diffx_fit_extractor", arguments.overrides, arguments.config_dirs))


def fit(config: dict[str, Any]) -> int:
    """Fits a classifier to the training split, saves it and returns the exit code."""
    console = Console()
    source: DataSource = make(config, "data")
    if source.num_classes < 2:
        raise DiffxError(f"data={source.name} has no labels to fit a classifier to; choose labelled data")
    out = Path(config["out"] or f"{Path(source.name).name}.safetensors").expanduser()
    if out.suffix != ".safetensors":
        raise DiffxError(f"out={out} must end in .safetensors")
    source.prepare()
    source.check()

    def split(name: SplitName) -> tuple[torch.Tensor, torch.Tensor]:
        images = source.split(name)
        whole = images.get(torch.arange(len(images)))
        return whole["x"], whole["label"]

    classifier = fit_classifier(
        *split("train"),
        *split("test"),
        name=Path(source.name).name,
        seed=config["seed"],
        epochs=config["epochs"],
        min_accuracy=config["min_accuracy"],
    )
    classifier.save(out)
    console.print(
        f"held-out accuracy {classifier.accuracy:.4f}: {out}\n"
        f"use it: diffx train data={source.name} extractor=classifier extractor.weights={out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
