"""From an image file to uint8 pixels: colour, orientation, size. One way for every file."""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageOps

from diffx.utils import DiffxError

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:  # where there is no wheel of it: PIL decodes to the same pixels, several times slower
    simplejpeg = None

T = TypeVar("T")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_SIXTEEN_BITS)
_TURNED = 0x0112  # the EXIF tag of the camera's orientation
_FRAME = struct.Struct(">HHB")
_MOST_PIXELS = 2 * 89_478_485  # PIL's limit, against files that unpack to more than the memory holds


@dataclass(frozen=True)
class Crop:
    """A part of an image, instead of its centre.

    Arguments:
        zoom: the image is scaled to cover `zoom` times the size, but is not enlarged for it; at least 1.
        left: where the crop lies in the width that is left over, in [0, 1).
        top: likewise in the height.
    """

    zoom: float
    left: float
    top: float


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
    with _opened(path) as file:
        size = (image_size, image_size)
        return _guarded(path, file, size, upscale, lambda image: _pixels(image, channels, size, None)).transpose(
            2, 0, 1
        )


def decode_image(
    data: bytes, name: object, channels: int, size: tuple[int, int], upscale: bool, crop: Crop | None = None
) -> np.ndarray:
    """The image of a file that is in memory, with the colours and the scaling of `read_image`.

    Arguments:
        data: the file's bytes.
        name: what messages call it.
        channels: 1 for grey, 3 for RGB.
        size: height and width of the result, in pixels; the image is scaled to cover both, then cropped.
        upscale: whether smaller images are enlarged; otherwise they are refused.
        crop: the part to take; the centre by default.

    Returns:
        uint8 `[height, width, channels]`.

    Raises:
        DiffxError: if it is corrupt, of an unknown kind, or too small, naming it.
    """
    found = _fast_jpeg(data, channels)
    if found is None:
        return _guarded(name, io.BytesIO(data), size, upscale, lambda image: _pixels(image, channels, size, crop))
    if found.shape[:2] == size and found.shape[2] == channels:
        return found
    image = Image.fromarray(found[..., 0] if found.shape[2] == 1 else found)
    _check_size(name, image, size, upscale)
    return _pixels(image, channels, size, crop)


def decode_into(
    pixels: np.ndarray, data: bytes, name: object, upscale: bool, crop: Crop | None = None, mirrored: bool = False
) -> None:
    """Writes the image of a file that is in memory to an array.

    Arguments:
        pixels: where to, uint8 `[height, width, channels]`, contiguous.
        data: the file's bytes.
        name: what messages call it.
        upscale: as in `decode_image`.
        crop: as in `decode_image`.
        mirrored: whether left and right are exchanged.

    Raises:
        DiffxError: as `decode_image`; what has been written then is of no use.
    """
    height, width, channels = pixels.shape
    found = _jpeg_header(data)
    if simplejpeg is not None and found is not None and found[:2] == (height, width) and found[2] <= channels:
        with suppress(ValueError):
            if mirrored:
                # the colours come backwards, since the bytes of each row will be reversed
                image = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "BGR")
                reverse_rows(image.reshape(height, -1), pixels.reshape(height, -1))
            else:
                simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", buffer=pixels)
            return
    image = decode_image(data, name, channels, (height, width), upscale, crop)
    pixels[:] = image[:, ::-1] if mirrored else image


def reverse_rows(rows: np.ndarray, out: np.ndarray) -> None:
    """Copies bytes in reverse order along the last dimension; arguments are uint8 `[..., n]` and contiguous."""
    if rows.shape[-1] % 8:
        out[:] = rows[..., ::-1]
    else:  # eight bytes at a time
        out.view("<u8")[:] = rows.view(">u8")[..., ::-1]


def check_header(path: Path, image_size: int, upscale: bool) -> None:
    """Raises the errors of `read_image` that can be found without decoding."""
    with _opened(path) as file:
        _guarded(path, file, (image_size, image_size), upscale, lambda image: None)


def image_shape(data: bytes, name: object) -> tuple[int, int]:
    """Height and width of the image in a file, before any turning, from its header.

    Raises:
        DiffxError: if it is no image, naming it.
    """
    return _guarded(name, io.BytesIO(data), (1, 1), True, lambda image: (image.height, image.width))


def _fast_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """An ordinary JPEG, uint8 `[H, W, 1 or 3]`; None for all else, which PIL reads or refuses."""
    if simplejpeg is None:
        return None
    found = _jpeg_header(data)
    if found is None or found[0] * found[1] > _MOST_PIXELS:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if found[2] == 1 and channels == 1 else "RGB")
    except ValueError:
        return None


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and components of a JPEG of 1 or 3 components that need not be turned; None for all else."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, end, found = 2, len(data) - 10, None
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xE1:  # EXIF or XMP
            return None
        if marker == 0xDA:  # the pixels
            return found
        if marker in (0xC0, 0xC1, 0xC2):
            found = _FRAME.unpack_from(data, at + 5)
            if found[2] not in (1, 3):
                return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DiffxError(f"'{path}' cannot be read as an image ({error}); replace or remove it") from error
    with file:
        yield file


def _guarded(
    name: object, file: IO[bytes], size: tuple[int, int], upscale: bool, read: Callable[[Image.Image], T]
) -> T:
    try:
        with Image.open(file) as image:
            if image.mode not in _MODES:
                raise DiffxError(
                    f"'{name}' has pixels of PIL's mode {image.mode}, which have no agreed range of values; save it "
                    "as grey or RGB of 8 bits"
                )
            _check_size(name, image, size, upscale)
            return read(image)
    except DiffxError:
        raise
    except Exception as error:  # each of PIL's decoders has its own kinds
        raise DiffxError(f"'{name}' cannot be read as an image ({error}); replace or remove it") from error


def _check_size(name: object, image: Image.Image, size: tuple[int, int], upscale: bool) -> None:
    if (image.height < size[0] or image.width < size[1]) and not upscale:
        wanted = f"data.image_size={size[0]}" if size[0] == size[1] else f"{size[1]}×{size[0]}"
        raise DiffxError(
            f"'{name}' has {image.width}×{image.height} pixels, too few for {wanted}; set "
            f"data.image_size={min(image.size)} or less, set data.upscale=true, or remove it"
        )


def _pixels(image: Image.Image, channels: int, size: tuple[int, int], crop: Crop | None) -> np.ndarray:
    if image.getexif().get(_TURNED, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _converted(image, "L" if channels == 1 else "RGB")
    height, width = size
    if crop is None:
        image = _scaled(image, height, width)
        left, top = (image.width - width) // 2, (image.height - height) // 2
    else:
        zoom = max(1.0, min(crop.zoom, image.width / width, image.height / height))
        image = _scaled(image, round(zoom * height), round(zoom * width))
        left, top = int(crop.left * (image.width - width + 1)), int(crop.top * (image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels)


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


def _scaled(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image in its proportions, just covering a size."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.width * height <= image.height * width:
        size = (width, round(image.height * width / image.width))
    else:
        size = (round(image.width * height / image.height), height)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
