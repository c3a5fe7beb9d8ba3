"""Pictures: sample grids as PNG."""

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


def write_png(image: Tensor, path: Path) -> None:
    """Writes uint8 `[C, H, W]`, C 1 or 3, as a PNG, whole or not at all."""
    array = image.cpu().permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")
