"""From an image file to uint8 pixels: colour, orientation, size. One way for every file."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from diffx.utils import DiffxError

T = TypeVar("T")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_SIXTEEN_BITS)
_TURNED = 0x0112  # the EXIF tag of the camera's orientation


def read_image(path: Path, channels: int, image_size: int, upscale: bool) -> np.ndarray:
    """Reads an image, turned as its EXIF orientation says, centre-cropped and scaled.

    Colour: grey and RGB are converted into each other as needed (to grey with the weights of ITU-R 601); palettes are
    looked up; CMYK by PIL's plain formula, without colour profiles; 16-bit grey is divided by 257 and rounded;
    transparent pixels are blended with white.

    Size: the image is halved with a box filter while its shorter side is at least twice `image_size`, then scaled with
    PIL's antialiased bicubic filter until the shorter side is `image_size`, then cropped at the centre. This is the
    preparation of ImageNet in *Diffusion Models Beat GANs on Image Synthesis* (arXiv 2105.05233), and changes nothing
    where the file already has the size.

    Arguments:
        path: the file.
        channels: 1 for grey, 3 for RGB.
        image_size: height and width of the result, in pixels.
        upscale: whether smaller images are enlarged; otherwise they are refused.

    Returns:
        uint8 `[channels, image_size, image_size]`.

    Raises:
        DiffxError: if the file is missing, corrupt, of an unknown kind, or too small, naming the file.
    """
    return _guarded(path, image_size, upscale, lambda image: _pixels(image, channels, image_size))


def check_header(path: Path, image_size: int, upscale: bool) -> None:
    """Raises the errors of `read_image` that can be found without decoding."""
    _guarded(path, image_size, upscale, lambda image: None)


def _guarded(path: Path, image_size: int, upscale: bool, read: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise DiffxError(
                    f"'{path}' has pixels of PIL's mode {image.mode}, which have no agreed range of values; save it "
                    "as grey or RGB of 8 bits"
                )
            if min(image.size) < image_size and not upscale:
                raise DiffxError(
                    f"'{path}' has {image.width}×{image.height} pixels, too few for data.image_size={image_size}; set "
                    f"data.image_size={min(image.size)} or less, set data.upscale=true, or remove it"
                )
            return read(image)
    except DiffxError:
        raise
    except Exception as error:  # each of PIL's decoders has its own kinds
        raise DiffxError(f"'{path}' cannot be read as an image ({error}); replace or remove it") from error


def _pixels(image: Image.Image, channels: int, image_size: int) -> np.ndarray:
    if image.getexif().get(_TURNED, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _scaled(_converted(image, "L" if channels == 1 else "RGB"), image_size)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image, image_size: int) -> Image.Image:
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    shorter = min(image.size)
    if shorter == image_size:
        return image
    size = (round(image.width * image_size / shorter), round(image.height * image_size / shorter))
    return image.resize(size, Image.Resampling.BICUBIC)
