"""A small classifier as extractor: metrics on small images within seconds, where Inception is slow and out of place."""

import hashlib
import math
import re
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffx.metrics.extractors.base import Extractor
from diffx.utils import DiffxError, atomic_path, nearest

_FORMAT = "diffx-classifier-1"
_DIM = 64
_TAKEN = ("inception", "clip", "dinov2", "none")


class Classifier(Extractor):
    """A convolutional network for small images; the features are its penultimate layer, 64 numbers.

    Use it when images are no photographs, or too small for Inception: grey digits, sprites, spectrograms. Fitted to the
    data's own classes it costs seconds instead of hours; its numbers can be compared with nobody else's.

    Arguments:
        name: what the metrics are called after, as in `fd_digits`: lower-case letters, digits and underscores.
        channels: the number C of channels.
        image_size: the height and width of the images in pixels, at least 4.
        num_classes: the number K of classes.
        data: the name of the data it is fitted to; `name` by default.

    Raises:
        DiffxError: if the name would not fit into the name of a metric.
    """

    def __init__(self, name: str, channels: int, image_size: int, num_classes: int, data: str = "") -> None:
        super().__init__()
        if not re.fullmatch(r"[a-z0-9_]+", name) or name in _TAKEN:
            raise DiffxError(
                f"a classifier cannot be called '{name}': choose lower-case letters, digits and underscores, "
                f"other than {', '.join(_TAKEN)}"
            )
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.dim = _DIM
        self.num_classes = num_classes
        self.data = data or name
        self.accuracy = math.nan
        self.preprocessing = f"{channels}x{image_size}x{image_size} uint8 / 127.5 - 1"
        # pooled to 4 × 4 and then 2 × 2: the features know roughly where things are
        halvings = max(int(math.log2(image_size / 4)), 0)
        # large images are pooled once after the first layer: most of the time would go to the full size
        early, halvings = (1, halvings - 1) if halvings > 1 else (0, halvings)
        self.trunk = nn.Sequential(
            *_convolution(channels, 32),
            *(nn.AvgPool2d(2) for _ in range(early)),
            *_convolution(32, 32),
            *(layer for i in range(halvings) for layer in (*_convolution(64 if i else 32, 64), nn.AvgPool2d(2))),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * (64 if halvings else 32), _DIM),
            nn.SiLU(),
        )
        self.head = nn.Linear(_DIM, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, 64]` and logits `[B, K]` of uint8 images `[B, C, H, W]`; differentiable in the weights."""
        features = self.trunk(images.to(torch.float32) / 127.5 - 1)
        return features, self.head(features)

    @property
    def weights_hash(self) -> str:
        """The sha256 over names, shapes and values of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def origin(self) -> str:
        """The data and the held-out accuracy."""
        return f"classifier of {self.data}, held-out accuracy {self.accuracy:.4f}"

    def check(self, channels: int, image_size: int) -> None:
        """Takes images of the shape it was fitted to.

        Raises:
            DiffxError: for images of another shape.
        """
        if (channels, image_size) != (self.channels, self.image_size):
            raise DiffxError(
                f"extractor '{self.name}' takes {self.channels}x{self.image_size}x{self.image_size} images, but the "
                f"data are {channels}x{image_size}x{image_size}: fit one to them (diffx fit-extractor) or take another"
            )

    def save(self, path: str | Path) -> None:
        """Writes weights and description as safetensors, whole or not at all.

        Raises:
            DiffxError: if the file cannot be written.
        """
        description = {
            "format": _FORMAT,
            "name": self.name,
            "channels": str(self.channels),
            "image_size": str(self.image_size),
            "num_classes": str(self.num_classes),
            "data": self.data,
            "accuracy": str(self.accuracy),
        }
        with atomic_path(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, temporary, description)

    @classmethod
    def load(cls, weights: str | Path) -> "Classifier":
        """Reads what `save` wrote.

        Raises:
            DiffxError: if the file is absent, damaged, or holds something else.
        """
        if not Path(weights).is_file():
            raise DiffxError(f"there is no classifier at '{weights}': correct the path or run diffx fit-extractor")
        try:
            with safe_open(weights, framework="pt") as file:
                said = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if said.get("format") != _FORMAT:
                raise DiffxError(f"'{weights}' is no classifier of this version of diffx: run diffx fit-extractor")
            channels, image_size, num_classes = (int(said[key]) for key in ("channels", "image_size", "num_classes"))
            classifier = cls(said["name"], channels, image_size, num_classes, said["data"])
            classifier.load_state_dict(state)
            classifier.accuracy = float(said["accuracy"])
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise DiffxError(
                f"the classifier at '{weights}' is damaged or of another version of diffx: fit it anew "
                "(diffx fit-extractor)"
            ) from error
        return classifier.requires_grad_(False).eval()

    @classmethod
    def shipped(cls, name: str) -> "Classifier":
        """A classifier that comes with diffx.

        Arguments:
            name: its name, as `digits`.

        Raises:
            DiffxError: if there is none of that name.
        """
        folder = resources.files("diffx.metrics") / "weights"
        names = [Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".safetensors")]
        if name not in names:
            raise DiffxError(
                f"diffx comes with no classifier '{name}'{nearest(name, names)}: choose one of {', '.join(names)}, "
                "or fit one (diffx fit-extractor)"
            )
        with resources.as_file(folder / f"{name}.safetensors") as path:
            return cls.load(path)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
