"""A small KL autoencoder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.autoencoders.variational import Variational
from diffx.utils import DiffxError, atomic_path

_FORMAT = "diffx-kl-autoencoder-1"
_GROUPS = 8


class KL(Variational):
    r"""A convolutional autoencoder with a Gaussian latent, small enough to be trained on a CPU.

    Residual blocks with group normalisation; each level but the last halves the resolution, so that the latent of an
    image of H pixels has H / 2^(levels − 1). It is trained on |x̂ − x| or (x̂ − x)², plus a faint KL divergence to
    N(0, I) (`diffx fit-autoencoder`): the first stage of Rombach et al. (arXiv 2112.10752, section 3.1) without its
    adversarial and perceptual losses, so that details finer than the latent are blurred. Use it when images are small,
    or to try latent diffusion without anybody's weights.

    Arguments:
        channels: the channels C of the images.
        latent_channels: the channels c of the latent.
        base: channels at full resolution, a multiple of 8.
        mult: the multiple of `base` at each level.
        blocks: residual blocks per level, in the encoder and in the decoder.
        batch_size: images that go through the network at a time.

    Attributes:
        about: how it was trained, plain values: the data, the loss, the PSNR on held-out images.

    Raises:
        DiffxError: if a number is out of its range.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int = 4,
        base: int = 16,
        mult: Sequence[int] = (1, 2),
        blocks: int = 1,
        batch_size: int = 64,
    ) -> None:
        super().__init__(torch.zeros(latent_channels), torch.ones(latent_channels), batch_size)
        if min(channels, latent_channels, blocks, *mult) < 1 or not mult or base < 1 or base % _GROUPS:
            raise DiffxError(
                f"an autoencoder needs positive numbers and a base that is a multiple of {_GROUPS}, not channels="
                f"{channels}, latent_channels={latent_channels}, base={base}, mult={list(mult)}, blocks={blocks}"
            )
        self.channels = channels
        self.settings = {
            "channels": channels,
            "latent_channels": latent_channels,
            "base": base,
            "mult": list(mult),
            "blocks": blocks,
        }
        self.factor = 2 ** (len(mult) - 1)
        self.about: dict[str, Any] = {}
        widths = [base * m for m in mult]
        self.encoder = nn.Sequential(*_encoder(channels, 2 * latent_channels, widths, blocks))
        self.decoder = nn.Sequential(*_decoder(latent_channels, channels, widths, blocks))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def moments(self, x: Tensor) -> Tensor:
        """μ and log σ² of images in [−1, 1]; see `Variational.moments`."""
        return self.encoder(x)

    def images(self, z: Tensor) -> Tensor:
        """Images of unscaled latents; see `Variational.images`."""
        return self.decoder(z)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """`(c, H / factor, W / factor)`; see `Autoencoder.latent_shape`."""
        if channels != self.channels or image_size % self.factor:
            raise DiffxError(
                f"the autoencoder takes images of {self.channels} channels whose size is a multiple of {self.factor} "
                f"pixels, and these are {channels}x{image_size}x{image_size}; train one on such data: "
                "diffx fit-autoencoder"
            )
        return self.settings["latent_channels"], image_size // self.factor, image_size // self.factor

    def save(self, path: str | Path) -> None:
        """Writes weights, scale and settings as safetensors, whole or not at all.

        Raises:
            DiffxError: if the file cannot be written.
        """
        description = {"format": _FORMAT, "settings": json.dumps(self.settings), "about": json.dumps(self.about)}
        with atomic_path(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, temporary, description)

    @classmethod
    def load(cls, weights: str, batch_size: int = 64) -> "KL":
        """Reads what `save` wrote, frozen and in evaluation mode.

        Arguments:
            weights: the file.
            batch_size: images that go through the network at a time.

        Raises:
            DiffxError: if the file is absent, damaged or something else.
        """
        path = Path(weights).expanduser()
        if not path.is_file():
            raise DiffxError(
                f"there is no autoencoder at '{weights}'; correct autoencoder.weights, or train one: diffx "
                "fit-autoencoder"
            )
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if said.get("format") != _FORMAT:
                raise DiffxError(
                    f"'{weights}' is no KL autoencoder of this version of diffx; train one: diffx fit-autoencoder"
                )
            with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
                autoencoder = cls(**json.loads(said["settings"]), batch_size=batch_size)
            autoencoder.load_state_dict(state)
            autoencoder.about = json.loads(said["about"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DiffxError(
                f"the autoencoder at '{weights}' is damaged; train it anew: diffx fit-autoencoder"
            ) from error
        return autoencoder.requires_grad_(False).eval()


def _encoder(inputs: int, outputs: int, widths: list[int], blocks: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
    width = widths[0]
    for level, new in enumerate(widths):
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1)] if level else []
        layers += [_Residual(width if i == 0 else new, new) for i in range(blocks)]
        width = new
    return [*layers, _Residual(width, width), *_head(width, outputs)]


def _decoder(inputs: int, outputs: int, widths: list[int], blocks: int) -> list[nn.Module]:
    width = widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(inputs, width, 3, padding=1), _Residual(width, width)]
    for level, new in reversed(list(enumerate(widths))):
        layers += [_Residual(width if i == 0 else new, new) for i in range(blocks)]
        layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(new, new, 3, padding=1)] if level else []
        width = new
    return [*layers, *_head(width, outputs)]


def _head(width: int, outputs: int) -> list[nn.Module]:
    return [nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(_GROUPS, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_out = nn.GroupNorm(_GROUPS, outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h)))
