"""`diffx data inspect`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.data import places_and_settings
from diffx.cli.data_pack import COLUMNS, cores, described
from diffx.data.pack import Manifest, PackSource, ShardSource, splits_of
from diffx.data.pack.inspect import Inspection, inspect, look_at_latent, pixels_of
from diffx.data.pack.processes import Stop
from diffx.data.pack.writer import verify
from diffx.pictures import grid, write_png
from diffx.utils import DiffxError
from diffx.utils.signals import StopSignal

KEYS: dict[str, Any] = {"out": None, "n": 100, "checksums": False, "classes": True, "workers": None}
_MOST_ROWS = 20
_MOST_BROKEN = 100


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 1 if anything is wrong with the samples."""
    places, settings = places_and_settings(argv)
    arguments = parse(settings)
    refuse_sweep(arguments.overrides)
    if len(places) != 1:
        raise DiffxError("say what to look at: diffx data inspect PATH")
    ConfigStore.instance().store(name="diffx_data_inspect", node=DictConfig({"defaults": ["_self_"], **KEYS}))
    config = compose_config("diffx_data_inspect", arguments.overrides, arguments.config_dirs)
    out = None if config["out"] is None else Path(config["out"]).expanduser()
    if out is not None and out.suffix != ".png":
        raise DiffxError(f"out={out} must end in .png")
    path, console = Path(places[0]).expanduser(), Console()
    wrong = 0
    with StopSignal() as asked:
        try:
            for name, source in splits_of(places[0], config["classes"]).items():
                folder = path / name if name else path
                picture = out.with_stem(f"{out.stem}-{name}") if out is not None and name else out
                wrong += _inspect(source, folder, config, picture, console, lambda: bool(asked))
        except Stop:
            return 128 + (asked.number or 0)
    return 1 if wrong else 0


def _inspect(
    source: PackSource, folder: Path, config: dict[str, Any], out: Path | None, console: Console, stop: Any
) -> int:
    """Looks at one split and tells what it holds; returns how much is wrong."""
    manifest = Manifest.beside(folder)
    latents = manifest is not None and bool(manifest.latents)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("inspect", total=len(source))
        workers = config["workers"] or cores()
        found = inspect(source, latents, workers, lambda done: bar.update(task, completed=done), stop)
    tell = _Teller(console)
    tell(described(manifest, folder) if manifest is not None else f"{source.where}: {len(source):,} samples")
    if manifest is not None:
        _tell_manifest(manifest, tell)
    _tell_values(found, latents, tell)
    _tell_classes(found, source.class_names, console)
    wrong = [f"{name}" for name in found.broken.values()]
    if manifest is not None and config["checksums"]:
        broken = [f"'{folder / shard.name}' {said}" for shard in manifest.shards if (said := verify(folder, shard))]
        tell("checksums   all agree" if not broken else f"checksums   {len(broken)} of {len(manifest.shards)} differ")
        wrong += broken
    if manifest is not None and manifest.count != len(source):
        wrong.append(f"the manifest says {manifest.count:,} samples, and there are {len(source):,}; pack them anew")
    tell(f"broken      {len(found.broken):,} samples")
    for said in wrong[:_MOST_BROKEN]:
        tell(f"  {said}")
    if wrong[_MOST_BROKEN:]:
        tell(f"  … and {len(wrong) - _MOST_BROKEN:,} more")
    if out is not None and found.count:
        rows = draw(source, found, latents, config["n"], out)
        tell(f"picture     {out}{f', from above: {rows}' if rows else ''}")
    return len(wrong)


class _Teller:
    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _tell_manifest(manifest: Manifest, tell: _Teller) -> None:
    parts = ", ".join(f"{extension} {count:,}" for extension, count in manifest.parts.items())
    tell(f"parts       {parts}\nmade of     {manifest.source['path']}")
    for key, said in list(manifest.skipped.items())[:_MOST_BROKEN]:
        tell(f"left out    {key}: {said}")
    if manifest.latents:
        mean, std = ([f"{value:.3f}" for value in manifest.latents[name]] for name in ("mean", "std"))
        shape = "x".join(map(str, manifest.latents["shape"]))
        tell(f"latents     {shape}, drawn: mean {' '.join(mean)}, standard deviation {' '.join(std)}")


def _tell_values(found: Inspection, latents: bool, tell: _Teller) -> None:
    for channels, (mean, std) in found.moments().items():
        unit = 1 if latents else 255
        means, stds = (" ".join(f"{value / unit:.4f}" for value in values) for values in (mean, std))
        what = "of the means" if latents else "in [0, 1]"
        tell(f"{channels} channels  mean {means}, standard deviation {stds} {what}")
    sizes = found.sizes.most_common()
    shown = ", ".join(f"{height}x{width} ({count:,})" for (height, width), count in sizes[:5])
    if sizes[5:]:
        shorter = [min(size) for size, _ in sizes]
        shown += f" and {len(sizes) - 5:,} more; shorter side {min(shorter)} to {max(shorter)}"
    tell(f"sizes       {shown}\nmodes       {', '.join(f'{m} ({n:,})' for m, n in found.modes.most_common())}")


def _tell_classes(found: Inspection, names: tuple[str, ...], console: Console) -> None:
    if set(found.classes) <= {None}:
        return
    unlabelled = found.classes.get(None, 0)
    counts = {label: count for label, count in found.classes.items() if label is not None}
    total = max(*counts, len(names) - 1) + 1
    values = np.array([counts.get(label, 0) for label in range(total)])
    console.print(
        f"classes     {total}, of {values.min():,} to {values.max():,} samples (median {np.median(values):,.0f}), "
        f"{(values == 0).sum()} empty" + (f"; {unlabelled:,} samples without a class" if unlabelled else ""),
        highlight=False,
        soft_wrap=True,
    )
    shown = Table(box=None, pad_edge=False)
    for column in ("class", "name", "samples", ""):
        shown.add_column(column, justify="right" if column in ("class", "samples") else "left")
    order = range(total) if total <= _MOST_ROWS else [*values.argsort()[:5], *values.argsort()[-5:]]
    for label in order:
        name = names[label] if label < len(names) else ""
        shown.add_row(str(label), name, f"{values[label]:,}", "█" * round(30 * values[label] / max(values.max(), 1)))
    console.print(shown)


def draw(source: PackSource, found: Inspection, latents: bool, n: int, out: Path) -> str:
    """Draws samples, a row for each class (of the first 20), and returns the classes of the rows."""
    labels = sorted(found.chosen, key=lambda label: -1 if label is None else label)[:_MOST_ROWS]
    columns = max(1, n // len(labels)) if len(labels) > 1 else max(1, round(n**0.5))
    rows = [found.chosen[label][:columns] for label in labels] if len(labels) > 1 else [found.chosen[labels[0]][:n]]
    (height, width), _ = found.sizes.most_common(1)[0]
    size = (height, width) if len(found.sizes) == 1 and max(height, width) <= 128 else (64, 64)
    if latents:
        size = (height, width)
    images = []
    for row in rows:
        shown = [_latent(source, i) if latents else _image(source, i, size) for i in row]
        blank = torch.full((3, *size), 96, dtype=torch.uint8)
        images += shown + [blank] * (-len(shown) % columns)
    write_png(grid(torch.stack(images), columns), out)
    names = source.class_names
    return ", ".join(names[k] if k is not None and k < len(names) else str(k) for k in labels) if labels[1:] else ""


def _image(source: PackSource, i: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(pixels_of(source.read(i), size, grey=False).copy())


def _latent(source: PackSource, i: int) -> torch.Tensor:
    """Three channels of the mean of a latent as red, green and blue."""
    assert isinstance(source, ShardSource)
    mean = look_at_latent(source, i)[2].astype(np.float32)
    low, high = mean.min(axis=(1, 2), keepdims=True), mean.max(axis=(1, 2), keepdims=True)
    scaled = ((mean - low) / np.maximum(high - low, 1e-6) * 255).round().astype(np.uint8)
    return torch.from_numpy(scaled[np.arange(3) % len(scaled)])
