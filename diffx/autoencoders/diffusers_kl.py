"""The autoencoders of the package diffusers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.autoencoders.variational import Variational
from diffx.utils import DiffxError


class DiffusersKL(Variational):
    r"""An `AutoencoderKL` of the package diffusers: Stable Diffusion's, SDXL's, Flux's and their kin.

    The latent is (z − shift_factor)·scaling_factor with the two factors of its configuration (0 and 0.18215 for Stable
    Diffusion 1; Rombach et al., arXiv 2112.10752, appendix G). Weights are read as safetensors only. Use it when images
    are photographs of 256 pixels and more, and for DiT's and SiT's recipes.

    Arguments:
        network: the `AutoencoderKL`.
        batch_size: images that go through the network at a time.
    """

    def __init__(self, network: Any, batch_size: int = 16) -> None:
        config = network.config
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        c = config["latent_channels"]
        super().__init__(torch.full((c,), shift), torch.full((c,), scale), batch_size)
        self.network = network
        self.channels: int = config["in_channels"]
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    def moments(self, x: Tensor) -> Tensor:
        """μ and log σ² of images in [−1, 1]; see `Variational.moments`."""
        return self.network.encode(x).latent_dist.parameters

    def images(self, z: Tensor) -> Tensor:
        """Images of unscaled latents; see `Variational.images`."""
        return self.network.decode(z).sample

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """`(c, H / factor, W / factor)`; see `Autoencoder.latent_shape`."""
        if channels != self.channels or image_size % self.factor:
            raise DiffxError(
                f"the autoencoder takes images of {self.channels} channels whose size is a multiple of {self.factor} "
                f"pixels, and these are {channels}x{image_size}x{image_size}; choose other data or another autoencoder"
            )
        return len(self.scale), image_size // self.factor, image_size // self.factor

    @classmethod
    def load(
        cls,
        weights: str,
        subfolder: str | None = None,
        revision: str | None = None,
        download: bool = False,
        batch_size: int = 16,
    ) -> "DiffusersKL":
        """Reads weights from a folder, from the cache of huggingface_hub, or from the hub; frozen, in evaluation mode.

        Arguments:
            weights: a folder, or the id of a model on the hub, such as `stabilityai/sd-vae-ft-ema`.
            subfolder: the folder in it, where it holds a whole pipeline.
            revision: the commit, branch or tag on the hub.
            download: whether to fetch what is neither local nor in the cache.
            batch_size: images that go through the network at a time.

        Raises:
            DiffxError: if diffusers is not installed, or the weights are not there or damaged.
        """
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # slow, and an optional extra
        except ImportError as error:
            raise DiffxError(
                f"autoencoder=diffusers needs the package diffusers ({error}); install it: pip install 'diffx[latents]'"
            ) from error
        local = Path(weights).expanduser()
        try:
            network = AutoencoderKL.from_pretrained(
                str(local) if local.is_dir() else weights,
                subfolder=subfolder,
                revision=revision,
                local_files_only=local.is_dir() or not download,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # otherwise it asks for the package accelerate
            )
        except Exception as error:  # huggingface_hub, safetensors and requests share no base class
            raise DiffxError(_missing(weights, local.is_dir(), download, error)) from error
        return cls(network, batch_size).requires_grad_(False).eval()


def _missing(weights: str, local: bool, download: bool, error: Exception) -> str:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local:
        return (
            f"'{weights}' holds no AutoencoderKL of diffusers as safetensors ({said}); set autoencoder.weights to the "
            "folder of its config.json, and autoencoder.subfolder=vae where that is a whole pipeline"
        )
    if download:
        return (
            f"the weights '{weights}' cannot be fetched ({said}); correct autoencoder.weights, or get the folder on a "
            "machine with internet and set autoencoder.weights to it"
        )
    return (
        f"the weights '{weights}' are neither a folder nor in the cache of huggingface_hub; correct "
        "autoencoder.weights, or let diffx fetch them with autoencoder.download=true where there is internet"
    )
