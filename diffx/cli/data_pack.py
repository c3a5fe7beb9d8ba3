"""`diffx data pack`."""

import os
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.data import places_and_settings
from diffx.data.pack import Interrupted, Layout, Manifest, PackSource, Transform, data_splits, pack, splits_of
from diffx.data.pack.find import Names
from diffx.utils import DiffxError
from diffx.utils.signals import StopSignal

TRANSFORM: dict[str, Any] = {
    "image_size": None,
    "channels": None,
    "filter": "adm",
    "format": None,
    "quality": 95,
    "upscale": False,
}
LAYOUT: dict[str, Any] = {"shard_size": 10_000, "shuffle": True, "seed": 0, "keys": "names", "num_classes": None}
KEYS: dict[str, Any] = {
    **TRANSFORM,
    **LAYOUT,
    "classes": True,
    "image_key": None,
    "label_key": None,
    "text_key": None,
    "broken": "stop",
    "workers": None,
}
"""What can be set, with its default."""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    places, settings = places_and_settings(argv)
    arguments = parse(settings)
    refuse_sweep(arguments.overrides)
    chosen = any(word.startswith("data=") for word in arguments.overrides)
    if len(places) != (1 if chosen else 2):
        raise DiffxError("say what and where to: diffx data pack SOURCE DEST, or diffx data pack DEST data=CHOICE")
    defaults: list[Any] = [*([{"data": "digits"}] if chosen else []), "_self_"]
    ConfigStore.instance().store(name="diffx_data_pack", node=DictConfig({"defaults": defaults, **KEYS}))
    config = compose_config("diffx_data_pack", arguments.overrides, arguments.config_dirs)
    transform = Transform(**{key: config[key] for key in TRANSFORM})
    layout = Layout(**{key: config[key] for key in LAYOUT})
    dest = Path(places[-1]).expanduser()
    if chosen:
        from diffx.cli.build import make  # slow to import, and seldom needed

        splits = data_splits(make(config, "data"), config["classes"])
    else:
        refuse_inside(Path(places[0]).expanduser(), dest)
        names = Names(config["image_key"], config["label_key"], config["text_key"])
        splits = splits_of(places[0], config["classes"], names)
    return run(splits, dest, transform, layout, config)


def run(splits: dict[str, PackSource], dest: Path, transform: Transform, layout: Layout, config: dict[str, Any]) -> int:
    """Packs each split into its folder and returns the exit code."""
    console = Console()
    folders = {name: dest / name for name in splits}
    refuse_others(dest, splits)
    with StopSignal() as asked:
        for name, source in splits.items():
            with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as bar:
                task = bar.add_task(f"pack {name}".strip(), total=len(source))
                try:
                    manifest = pack(
                        source,
                        folders[name],
                        transform,
                        layout,
                        broken=config["broken"],
                        workers=config["workers"] or cores(),
                        on_sample=lambda done, total, bar=bar, task=task: bar.update(task, completed=done),
                        stop=lambda: bool(asked),
                    )
                except Interrupted as interrupted:
                    console.print(str(interrupted), highlight=False)
                    return 128 + (asked.number or 0)
            console.print(described(manifest, folders[name]), highlight=False, soft_wrap=True)
    train = folders.get("train", dest)
    test = f" data.test_shards={folders['test']}" if "test" in folders else ""
    found = Manifest.load(train)
    size = next((size.split("x")[0] for size in found.sizes if len(found.sizes) == 1), "N")
    console.print(
        f"look at them:   diffx data inspect {train} out=grid.png\n"
        f"train on them:  diffx train data=webdataset data.shards={train}{test} data.image_size={size} "
        f"data.num_classes={found.num_classes}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)


def described(manifest: Manifest, folder: Path) -> str:
    """One line: what a folder of shards holds."""
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels"
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    skipped = f", {len(manifest.skipped):,} skipped" if manifest.skipped else ""
    return (
        f"{folder}: {manifest.count:,} samples, {classes}, in {len(manifest.shards)} shards of {size:,.1f} MB in all"
        f"{skipped}, fingerprint {manifest.fingerprint()[:12]}"
    )


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_inside(source: Path, dest: Path) -> None:
    """Refuses to write into the folder that is read.

    Raises:
        DiffxError: naming both.
    """
    if source.is_dir() and dest.resolve().is_relative_to(source.resolve()):
        raise DiffxError(f"DEST '{dest}' lies in SOURCE '{source}', and would be packed too; choose a folder outside")


def refuse_others(dest: Path, splits: dict[str, PackSource]) -> None:
    """Refuses a folder that holds more than the splits' own folders.

    Raises:
        DiffxError: naming what it holds.
    """
    if "" not in splits and dest.is_dir():
        other = next((path for path in sorted(dest.iterdir()) if path.name not in splits), None)
        if other is not None:
            raise DiffxError(f"'{dest}' holds '{other.name}' already, which is no split; choose a new or empty folder")
