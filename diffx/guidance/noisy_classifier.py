"""A classifier of noisy images."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.backbones.unet import Attention, ConvDown, ResidualBlock, ScaleShiftNorm, Stage
from diffx.nn import ConditionEmbedding
from diffx.utils import DiffxError, atomic_path

_FORMAT = "diffx-noisy-classifier-1"
_GROUPS = 8


class NoisyClassifier(nn.Module):
    r"""log p(y | x_t) at every noise level, by the encoder half of a U-Net.

    logits = b + ᾱ·F(u, logSNR) with u = x_t/√(α² + σ²), the sample on the variance-preserving schedule, and
    ᾱ = √sigmoid(logSNR): x_t says the less about y the smaller ᾱ is, log p(y | x_t) = log p(y) + O(ᾱ). So the gradient,
    which guidance divides by ᾱ, stays bounded down to zero signal. Told the logSNR, it serves any schedule; beyond the
    noise levels of its training the nearest of them is told. Dhariwal and Nichol (arXiv 2105.05233), Sec. 4, take the
    down-sampling half of their U-Net likewise. Use it when samples are to be guided by `ClassifierGuidance`.

    Arguments:
        channels: the channels C of what the denoiser sees: images, or an autoencoder's latents.
        image_size: their height and width, at least 4.
        num_classes: the number K of classes.
        width: channels at full resolution; a multiple of 8. Each of the deeper levels has twice as many.
        dropout: the probability of dropping an activation.

    Attributes:
        logsnr_min: the noisiest level of the training.
        logsnr_max: the cleanest.
        about: how it was trained, plain values: the data, the schedule, the held-out accuracy by logSNR.

    Raises:
        DiffxError: if the images are too small, there are fewer than two classes or the width is no multiple of 8.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        if num_classes < 2:
            raise DiffxError(
                f"a classifier needs labels of at least two classes, not {num_classes}; choose labelled data"
            )
        if image_size < 4 or width < 1 or width % _GROUPS:
            raise DiffxError(
                f"a classifier needs images of at least 4 pixels and a width that is a multiple of {_GROUPS}, not "
                f"{image_size} and {width}; set classifier.width=32"
            )
        self.shape = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
        self.settings = {**self.shape, "width": width, "dropout": dropout}
        self.logsnr_min, self.logsnr_max = -math.inf, math.inf
        self.about: dict[str, Any] = {}
        norm = partial(nn.GroupNorm, _GROUPS)
        block = partial(ResidualBlock, norm, partial(ScaleShiftNorm, norm, 4 * width), dropout)
        # halved to between 4 and 7 pixels: where things are still matters there
        deep = 2 * width if image_size >= 8 else width
        layers: list[nn.Module] = [block(width, width)]
        for level in range(int(math.log2(image_size / 4))):
            into = deep if level else width
            layers += [ConvDown(into), block(into, deep)]
        self.embedding = ConditionEmbedding(width, 4 * width, 0)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.layers = Stage([*layers, Attention(norm, deep, 1), block(deep, deep)])
        self.norm_out = norm(deep)
        self.out = nn.Linear(16 * deep, num_classes)
        self.prior = nn.Parameter(torch.zeros(num_classes))

    def forward(self, u: Tensor, logsnr: Tensor) -> Tensor:
        """The logits.

        Arguments:
            u: noisy images, variance-preserving, `[B, C, H, W]`.
            logsnr: their noise levels, `[B]`.

        Returns:
            Logits, `[B, K]`, in the dtype of the weights.

        Raises:
            DiffxError: for images of another shape than it was trained on.
        """
        if u.ndim != 4 or u.shape[1:] != (self.shape["channels"], *(self.shape["image_size"],) * 2):
            raise DiffxError(
                f"the classifier knows images of {_pixels(**self.shape)}, and these are "
                f"{'x'.join(map(str, u.shape[1:]))}; train one on such data: diffx fit-classifier"
            )
        dtype = self.prior.dtype
        u, logsnr = u.to(dtype), logsnr.to(dtype)
        embedding = self.embedding(logsnr.clamp(self.logsnr_min, self.logsnr_max))
        h = F.silu(self.norm_out(self.layers(self.conv_in(u), embedding)))
        features = F.adaptive_avg_pool2d(h, 4).flatten(1)
        return self.prior + torch.sigmoid(logsnr).sqrt()[:, None] * self.out(features)

    def save(self, path: str | Path) -> None:
        """Writes weights and description as safetensors, whole or not at all.

        Raises:
            DiffxError: if the file cannot be written.
        """
        description = {
            "format": _FORMAT,
            "settings": json.dumps(self.settings),
            "logsnr": json.dumps([self.logsnr_min, self.logsnr_max]),
            "about": json.dumps(self.about),
        }
        with atomic_path(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, temporary, description)

    @classmethod
    def load(
        cls,
        weights: str,
        channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
    ) -> "NoisyClassifier":
        """Reads what `save` wrote, frozen and in evaluation mode.

        Arguments:
            weights: the file.
            channels: the channels that the images will have; None is not checked, nor are the next two.
            image_size: their height and width in pixels.
            num_classes: the number of classes.

        Raises:
            DiffxError: if the file is absent, damaged or something else, or the classifier is one of other images.
        """
        if not Path(weights).expanduser().is_file():
            raise DiffxError(f"there is no classifier at '{weights}'; correct the path or run diffx fit-classifier")
        try:
            with safe_open(Path(weights).expanduser(), framework="pt") as file:
                said = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if said.get("format") != _FORMAT:
                raise DiffxError(
                    f"'{weights}' is no classifier of noisy images of this version of diffx; run diffx fit-classifier"
                )
            classifier = cls(**json.loads(said["settings"]))
            classifier.load_state_dict(state)
            classifier.logsnr_min, classifier.logsnr_max = map(float, json.loads(said["logsnr"]))
            classifier.about = json.loads(said["about"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DiffxError(
                f"the classifier at '{weights}' is damaged; train it anew: diffx fit-classifier"
            ) from error
        expected = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
        asked = classifier.shape | {key: value for key, value in expected.items() if value is not None}
        if asked != classifier.shape:
            raise DiffxError(
                f"the classifier at '{weights}' knows images of {_pixels(**classifier.shape)}, and these are "
                f"{_pixels(**asked)}; train one on such data: diffx fit-classifier"
            )
        return classifier.requires_grad_(False).eval()


def _pixels(channels: int, image_size: int, num_classes: int) -> str:
    return f"{channels}x{image_size}x{image_size} in {num_classes} classes"
