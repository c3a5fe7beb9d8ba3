"""From a sample to what is stored of it: size, colour, file format."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from diffx.data.decode import decode_image
from diffx.data.pack.source import Sample
from diffx.utils import DiffxError

Filter = Literal["adm", "box", "bilinear", "bicubic", "lanczos"]
Format = Literal["jpg", "png", "webp", "npy"]

_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_TURNED = 0x0112  # the EXIF tag of the camera's orientation
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Stored:
    """What is written of a sample.

    Arguments:
        data: the bytes of its image.
        extension: their kind.
        height: in pixels.
        width: in pixels.
    """

    data: bytes
    extension: str
    height: int
    width: int


@dataclass(frozen=True)
class Header:
    """What the beginning of an image file says.

    Arguments:
        kind: the kind of file, as PIL calls it.
        mode: PIL's mode.
        height: in pixels, turned as the file says.
        width: likewise.
        animated: whether there is more than one image in it.
    """

    kind: str
    mode: str
    height: int
    width: int
    animated: bool

    @property
    def grey(self) -> bool:
        """Whether there are no colours in it."""
        return self.mode in ("1", "L", "LA") or self.mode.startswith("I;16")


def header_of(data: bytes, name: str) -> Header:
    """Reads the beginning of an image file.

    Raises:
        DiffxError: if it is none, naming it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size[::-1] if image.getexif().get(_TURNED, 1) in _SIDEWAYS else image.size
            return Header(image.format or "", image.mode, size[1], size[0], getattr(image, "n_frames", 1) > 1)
    except Exception as error:  # each of PIL's decoders has its own kinds
        raise DiffxError(f"'{name}' cannot be read as an image ({error}); replace or remove it") from error


def file_of(sample: Sample) -> bytes:
    """The bytes of an image file: pixels become a PNG."""
    return sample.image if isinstance(sample.image, bytes) else _png(sample.image)


@dataclass(frozen=True)
class Transform:
    """Size, colour and file format of stored images.

    A file that nothing changes about is stored as it is, byte by byte; it is decoded nevertheless, to see that it can
    be. All else is decoded and oriented as `diffx.data.decode.read_image` says, and encoded anew. An animation becomes
    its first image.

    Size: the image is scaled until its shorter side is `image_size`, then cropped at the centre. All filters are
    antialiased: PIL's, whose support grows with the reduction. `adm` is the preparation of ImageNet in *Diffusion
    Models Beat GANs on Image Synthesis* (arXiv 2105.05233): halved with a box filter while it is at least twice as
    large, then bicubic.

    Arguments:
        image_size: height and width in pixels; None leaves the size.
        channels: 1 for grey, 3 for RGB; None leaves what is either, and makes RGB of all else that is encoded anew.
        filter: how to scale.
        format: the kind of file; None keeps JPEG, PNG and WebP files that nothing changes about, and makes PNG of the
            others.
        quality: of JPEG files, 1..100; their colours are not subsampled.
        upscale: whether smaller images are enlarged, instead of refused.

    Raises:
        DiffxError: if a number is out of its range.
    """

    image_size: int | None = None
    channels: int | None = None
    filter: Filter = "adm"
    format: Format | None = None
    quality: int = 95
    upscale: bool = False

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("channels", self.channels, (None, 1, 3)),
            ("filter", self.filter, get_args(Filter)),
            ("format", self.format, (None, *get_args(Format))),
        ):
            if value not in allowed:
                shown = ", ".join("null" if choice is None else str(choice) for choice in allowed)
                raise DiffxError(f"{key}={value} is none of {shown}; choose one of them")
        if (self.image_size is not None and self.image_size < 1) or not 1 <= self.quality <= 100:
            raise DiffxError("image_size must be at least 1 pixel and quality in 1..100; correct them")
        if self.format == "npy" and self.image_size is None:
            raise DiffxError("format=npy stores arrays of one size; set image_size too, or choose another format")

    def __call__(self, sample: Sample) -> Stored:
        """What is stored of a sample.

        Raises:
            DiffxError: if its image is corrupt, of an unknown kind, or too small, naming it.
        """
        data = file_of(sample)
        header = header_of(data, sample.name)
        pixels = self._pixels(data, header, sample.name)
        same_size = pixels.shape[:2] == (header.height, header.width)
        same_colours = self.channels is None or header.mode == _MODES[self.channels]
        kind = _KEPT.get(header.kind)
        if same_size and same_colours and not header.animated and kind and self.format in (None, kind):
            return Stored(data, kind, header.height, header.width)
        extension = self.format or "png"
        return Stored(_ENCODERS[extension](pixels, self.quality), extension, *pixels.shape[:2])

    def pixels(self, sample: Sample) -> np.ndarray:
        """The decoded, cropped and scaled image of a sample, uint8 `[H, W, C]`; errors as those of a call."""
        data = file_of(sample)
        return self._pixels(data, header_of(data, sample.name), sample.name)

    def _pixels(self, data: bytes, header: Header, name: str) -> np.ndarray:
        channels = self.channels or (1 if header.grey else 3)
        own = (header.height, header.width)
        size = own if self.image_size is None else (self.image_size, self.image_size)
        try:
            if size != own and self.filter != "adm" and (self.upscale or min(own) >= size[0]):
                return self._scaled(decode_image(data, name, channels, own, True), size[0])
            # refuses what is too small, which an image in its own size never is
            return decode_image(data, name, channels, size, self.upscale or size == own)
        except DiffxError as error:
            raise DiffxError(re.sub(r"\bdata\.(image_size|upscale)", r"\1", str(error))) from error

    def _scaled(self, whole: np.ndarray, size: int) -> np.ndarray:
        """The centre of an image whose shorter side is scaled to `size` by one filter."""
        height, width, channels = whole.shape
        shorter = min(height, width)
        image = Image.fromarray(whole[..., 0] if channels == 1 else whole)
        scaled = image.resize(
            (round(width * size / shorter), round(height * size / shorter)), Image.Resampling[self.filter.upper()]
        )
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        return np.asarray(scaled.crop((left, top, left + size, top + size))).reshape(size, size, channels)


_MODES = {1: "L", 3: "RGB"}


def _saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _jpg(pixels: np.ndarray, quality: int) -> bytes:
    return _saved(pixels, "JPEG", quality=quality, subsampling=0)


def _png(pixels: np.ndarray, quality: int = 0) -> bytes:
    return _saved(pixels, "PNG")


def _webp(pixels: np.ndarray, quality: int) -> bytes:
    return _saved(pixels, "WEBP", lossless=True)


def _npy(pixels: np.ndarray, quality: int) -> bytes:
    """An array `[C, H, W]`."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[np.ndarray, int], bytes]] = {"jpg": _jpg, "png": _png, "webp": _webp, "npy": _npy}
