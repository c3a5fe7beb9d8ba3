"""Images to be measured: a folder of files, or one array, exactly as they are."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffx.data.base import Images, TensorImages
from diffx.data.file_images import FileImages
from diffx.data.listing import list_images
from diffx.utils import DiffxError


def load_images(path: str | Path, channels: int, image_size: int) -> Images:
    """Images that nothing is done to: another size or colour is an error, not a reason to resize.

    Arguments:
        path: a folder of image files, its subfolders being classes if it has any, or an `.npz` file with `arr_0`
            uint8 `[N, H, W, C]` (ADM's evaluation layout) and, where there are classes, `label` `[N]`.
        channels: 1 for grey, 3 for RGB.
        image_size: height and width in pixels.

    Raises:
        DiffxError: if there are none, a file is damaged, or images have another size or colour.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path, channels, image_size)
    if path.suffix != ".npz" or not path.is_file():
        raise DiffxError(f"there are no images at '{path}'; give a folder of image files or an .npz with arr_0")
    try:
        with np.load(path, allow_pickle=False) as file:
            array = np.asarray(file["arr_0"])
            labels = np.asarray(file["label"]) if "label" in file else np.zeros(len(array))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DiffxError(f"'{path}' is damaged or holds no array arr_0 ({error}); write it anew") from error
    if array.dtype != np.uint8 or array.ndim != 4 or len(labels) != len(array):
        raise DiffxError(
            f"'{path}' holds {array.dtype} {list(array.shape)}; images are uint8 [N, H, W, C], as they would be saved"
        )
    if array.shape[1:] != (image_size, image_size, channels):
        raise DiffxError(_wrong(path, array.shape[2], array.shape[1], array.shape[3], channels, image_size))
    if len(array) == 0:
        raise DiffxError(f"'{path}' holds no images; sample some first")
    return TensorImages(torch.from_numpy(array).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))


def _folder(path: Path, channels: int, image_size: int) -> Images:
    listing = list_images(path, labels=True)
    for name in listing.names:
        try:
            with Image.open(path / name) as image:
                found = len(image.getbands()) if image.mode != "P" else 3
                size = image.size
        except OSError as error:
            raise DiffxError(f"'{path / name}' is no image ({error}); remove it or write it anew") from error
        if size != (image_size, image_size) or found != channels:
            raise DiffxError(_wrong(path / name, *size, found, channels, image_size))
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    return FileImages(path, listing.names, labels, channels, image_size, upscale=False)


def _wrong(path: Path, width: int, height: int, found: int, channels: int, image_size: int) -> str:
    return (
        f"'{path}' is {width}x{height} with {found} channels, but the reference is {image_size}x{image_size} with "
        f"{channels}; resizing or converting would change the metric, so write them in the size and colour of the data"
    )
