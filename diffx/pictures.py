"""Pictures of samples: grids, trajectories, pairs and their change over training, as PNG and GIF."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffx.generate import Generator
from diffx.utils import atomic_path


def save_grid(generator: Generator, path: Path, per_class: int, device: torch.device | str = "cpu") -> None:
    """Samples and saves a grid with one row per class; unlabelled models get a square grid of per_class² samples.

    Arguments:
        generator: makes the samples; sample k is of class k mod num_classes, so that the noise of a grid never changes.
        path: the PNG file.
        per_class: samples in a row.
        device: where to sample.
    """
    rows = min(generator.num_classes, 20) or per_class
    classes = max(generator.num_classes, 1)
    number = torch.arange(rows * per_class, device=device)
    row, column = number // per_class, number % per_class
    index = column * classes + row if generator.num_classes else number
    images = torch.cat([generator(part).images for part in index.split(256)])
    write_png(grid(images, per_class), path)


def grid(images: Tensor, columns: int, gap: int = 1, least: int = 320) -> Tensor:
    """Images side by side, enlarged by a whole factor where they are small.

    Arguments:
        images: uint8 `[N, C, H, W]`, C 1 or 3, row by row.
        columns: images per row.
        gap: pixels between images, before enlarging.
        least: the grid is enlarged until its width is at least this many pixels.

    Returns:
        uint8 `[C, height, width]`.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 96, dtype=torch.uint8)
    for k, image in enumerate(images.cpu()):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    factor = max(1, -(-least // canvas.shape[-1]))
    return canvas.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def save_trajectory(
    generator: Generator, path: Path, index: Tensor, label: Tensor | None = None, columns: int = 10
) -> None:
    """How samples come out of the noise: for each a row of x_t, scaled to unit variance of the noisy end, and one of x̂.

    Arguments:
        generator: makes the samples.
        path: the PNG file.
        index: sample numbers, int64 `[B]`, on the device to sample on.
        label: classes, int64 `[B]`; the balanced ones by default.
        columns: at most so many of the steps are shown, evenly chosen, the first and the last among them.
    """
    label = generator.labels(index) if label is None else label
    times = generator.times()
    schedule = generator.denoiser.schedule
    cond = generator.conditioner({"label": label})
    noisy, estimates = [], []
    with torch.no_grad():
        for t, x in zip(times[1:].to(index.device, torch.float32), generator.trajectory(index, label), strict=True):
            alpha, sigma = schedule(t.to(schedule.device))
            noisy.append(generator.autoencoder.decode(x / (alpha**2 + sigma**2).sqrt().to(x)))
            estimates.append(generator.autoencoder.decode(generator.denoiser(x, t, **cond) if sigma > 0 else x))
    shown = torch.linspace(0, len(noisy) - 1, min(columns, len(noisy))).round().long().tolist()
    rows = [torch.stack([steps[k][b] for k in shown]) for b in range(len(index)) for steps in (noisy, estimates)]
    write_png(grid(torch.cat(rows), len(shown), least=640), path)


def save_pairs(above: Tensor, below: Tensor, path: Path, columns: int = 10) -> None:
    """Images with their counterparts below them.

    Arguments:
        above: uint8 `[N, C, H, W]`.
        below: uint8 `[N, C, H, W]`.
        path: the PNG file.
        columns: pairs side by side.
    """
    blank = -len(above) % columns
    padded = [torch.cat([x.cpu(), x.new_full((blank, *x.shape[1:]), 96).cpu()]) for x in (above, below)]
    rows = torch.stack([x.unflatten(0, (-1, columns)) for x in padded], dim=1)
    write_png(grid(rows.flatten(0, 2), columns), path)


def save_animation(pictures: list[Path], path: Path, seconds: float = 0.5) -> None:
    """PNG files of one size as an endless GIF, the last shown longer.

    Arguments:
        pictures: the files, in order.
        path: the GIF file.
        seconds: how long each is shown.
    """
    frames = [Image.open(picture).convert("RGB") for picture in pictures]
    durations = [1000 * seconds] * (len(frames) - 1) + [4000 * seconds]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def write_png(image: Tensor, path: Path) -> None:
    """Writes uint8 `[C, H, W]`, C 1 or 3, as a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(image))


def png_bytes(image: Tensor) -> bytes:
    """Uint8 `[C, H, W]`, C 1 or 3, as the bytes of a PNG file."""
    array = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()
