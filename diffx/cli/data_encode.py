"""`diffx data encode`."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from diffx.autoencoders import Variational
from diffx.cli.build import make
from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.data import places_and_settings
from diffx.cli.data_encoding import Encoding
from diffx.cli.data_pack import COLUMNS, LAYOUT, cores, described, refuse_inside, refuse_others
from diffx.cli.launch import launch
from diffx.cli.sample import device_of
from diffx.data.pack import Interrupted, Layout, Manifest, Transform, data_splits, splits_of
from diffx.utils import DiffxError
from diffx.utils.signals import StopSignal

TRANSFORM: dict[str, Any] = {"image_size": None, "filter": "adm", "upscale": False}
KEYS: dict[str, Any] = {
    **TRANSFORM,
    **LAYOUT,
    "dtype": "float16",
    "flip": False,
    "batch_size": 64,
    "classes": True,
    "workers": None,
    "device": "auto",
    "devices": 1,
    "rank": None,
    "world_size": None,
}
"""What can be set, with its default."""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    places, settings = places_and_settings(argv)
    arguments = parse(settings)
    refuse_sweep(arguments.overrides)
    chosen = any(word.startswith("data=") for word in arguments.overrides)
    if len(places) != (1 if chosen else 2):
        raise DiffxError("say what and where to: diffx data encode SOURCE DEST autoencoder=CHOICE")
    if not any(word.startswith("autoencoder=") for word in arguments.overrides):
        raise DiffxError("say by what: diffx data encode SOURCE DEST autoencoder=kl autoencoder.weights=FILE")
    defaults: list[Any] = [*([{"data": "digits"}] if chosen else []), {"autoencoder": "pixels"}, "_self_"]
    ConfigStore.instance().store(name="diffx_data_encode", node=DictConfig({"defaults": defaults, **KEYS}))
    config = compose_config("diffx_data_encode", arguments.overrides, arguments.config_dirs)
    rank, world_size = _process(config)
    dest = Path(places[-1]).expanduser()
    if not chosen:
        refuse_inside(Path(places[0]).expanduser(), dest)
    autoencoder = make(config, "autoencoder")
    if not isinstance(autoencoder, Variational):
        raise DiffxError("this autoencoder has no latents to store; choose autoencoder=kl or autoencoder=diffusers")
    splits = data_splits(make(config, "data"), config["classes"]) if chosen else splits_of(places[0], config["classes"])
    refuse_others(dest, splits)
    transform = Transform(**{key: config[key] for key in TRANSFORM}, channels=autoencoder.channels)
    layout = Layout(**{key: config[key] for key in LAYOUT})
    jobs = [
        Encoding(
            source,
            dest / name,
            autoencoder,
            transform,
            layout,
            dtype=config["dtype"],
            flip=config["flip"],
            batch_size=config["batch_size"],
            threads=config["workers"] or max(1, cores() // config["devices"]),
        )
        for name, source in splits.items()
    ]
    if config["devices"] > 1 and "LOCAL_RANK" not in os.environ:
        return launch(["-m", "diffx.cli.main", "data", "encode", *argv], config["devices"])
    again = " ".join(word for word in arguments.overrides if word.startswith("autoencoder"))
    try:
        return run(jobs, device_of(config), rank, world_size, again)
    except DiffxError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # otherwise only the first process speaks
            print(f"diffx: {error}", file=sys.stderr)
        raise


def run(jobs: list[Encoding], device: str, rank: int, world_size: int, again: str) -> int:
    """Encodes this process's shards of each split and returns the exit code.

    Arguments:
        jobs: one for each split.
        device: where to encode; of several, `cuda` is that of the local rank.
        rank: this process.
        world_size: how many there are.
        again: how the autoencoder was chosen, for what to type next.
    """
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    console = Console(quiet=local > 0)
    target = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    with StopSignal() as asked:
        for job in jobs:
            with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as bar:
                task = bar.add_task("encode", total=len(job.source))
                try:
                    manifest = job(
                        target,
                        rank,
                        world_size,
                        lambda done, total, bar=bar, task=task: bar.update(task, completed=done, total=total),
                        lambda: bool(asked),
                    )
                except Interrupted as interrupted:
                    console.print(str(interrupted), highlight=False)
                    return 128 + (asked.number or 0)
            if manifest is None:
                said = f"process {rank} of {world_size} has encoded its shards; the last one to end writes the manifest"
            else:
                said = described(manifest, job.dest)
                if job is jobs[0]:  # the training split, where there are several
                    said += f"\ntrain on them:  {_next(manifest, job.dest)} {again}"
            console.print(said, highlight=False, soft_wrap=True, markup=False)
    return 0


def _next(manifest: Manifest, dest: Path) -> str:
    (c, h, _), (channels, size, _) = manifest.latents["shape"], manifest.latents["image"]
    return (
        f"diffx train data=latents data.shards={dest} data.channels={c} data.image_size={h} data.decoded_channels="
        f"{channels} data.decoded_size={size} data.num_classes={manifest.num_classes} thresholding=none"
    )


def _process(config: dict[str, Any]) -> tuple[int, int]:
    """Which of how many processes this one is: as told, or as torchrun, srun or diffx itself have started them.

    Raises:
        DiffxError: if rank and world_size do not go together.
    """
    rank, world_size = config["rank"], config["world_size"]
    if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < world_size):
        raise DiffxError(f"rank={rank} world_size={world_size} do not go together; give both, as rank=0 world_size=4")
    if rank is not None:
        if config["devices"] > 1:
            raise DiffxError("devices= starts processes here, and rank= is one of several; give one of the two")
        return rank, world_size
    environment = os.environ
    if "WORLD_SIZE" in environment:
        return int(environment.get("RANK", environment.get("LOCAL_RANK", "0"))), int(environment["WORLD_SIZE"])
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:  # srun; a batch script alone is one process
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
    return 0, 1
