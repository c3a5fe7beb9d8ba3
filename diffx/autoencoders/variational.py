"""What all autoencoders share that give a distribution of latents for each image."""

from abc import abstractmethod

import torch
from torch import Tensor

from diffx.autoencoders.base import Autoencoder
from diffx.autoencoders.pixels import Pixels
from diffx.utils import DiffxError, Keys


class Variational(Autoencoder):
    r"""An autoencoder whose encoder gives a Gaussian for each image, and the latent is a draw from it.

    z = μ + exp(½ log σ²)·ε with ε ~ N(0, I); what is diffused is (z − shift)·scale, of about unit variance (Rombach et
    al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752, section 3.1 and appendix G).
    The moments μ and log σ² can be computed beforehand (`diffx data encode`), and the draw is still another one each
    time. A new one writes `moments`, `images` and `latent_shape`.

    Arguments:
        shift: what is subtracted from each channel of a latent, `[c]`.
        scale: by what it is multiplied then, `[c]`.
        batch_size: images that go through the network at a time.
    """

    channels: int
    """The channels C of the images."""
    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise DiffxError(f"autoencoder.batch_size is {batch_size}; set it to at least 1")
        self.register_buffer("shift", shift.detach().clone().to(torch.float32))
        self.register_buffer("scale", scale.detach().clone().to(torch.float32))
        self.batch_size = batch_size
        self._pixels = Pixels()

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """The distribution of the latent of each image.

        Arguments:
            x: images in [−1, 1], float32 `[B, C, H, W]`.

        Returns:
            μ and log σ² one after the other, float32 `[B, 2c, h, w]`.
        """

    @abstractmethod
    def images(self, z: Tensor) -> Tensor:
        """Images in about [−1, 1], `[B, C, H, W]`, of latents as the decoder takes them, `[B, c, h, w]`."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The scaled latents of a batch, drawn by the global sample number; see `Autoencoder.encode`.

        Arguments:
            batch: holds `moments` `[B, 2c, h, w]` or, where they have not been computed before, `x`, uint8
                `[B, C, H, W]`; and `index`, int64 `[B]`. Without an index latents are the means.
        """
        moments = batch["moments"] if "moments" in batch else self.encoded(batch["x"])
        return self.scaled(self.drawn(moments, batch.get("index")))

    def decode(self, latent: Tensor) -> Tensor:
        """The images of scaled latents, uint8 `[B, C, H, W]`; see `Autoencoder.decode`."""
        shift, scale = self.shift[:, None, None], self.scale[:, None, None]
        parts = (latent.to(torch.float32) / scale + shift).split(self.batch_size)
        with torch.autocast(latent.device.type, enabled=False):
            return torch.cat([self._pixels.decode(self.images(z)) for z in parts])

    def encoded(self, x: Tensor) -> Tensor:
        """The moments of uint8 images `[B, C, H, W]`, float32 `[B, 2c, h, w]`, whatever the precision of training is.

        Raises:
            DiffxError: if `x` is not uint8.
        """
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([self.moments(part) for part in self._pixels.encode({"x": x}).split(self.batch_size)])

    def drawn(self, moments: Tensor, index: Tensor | None) -> Tensor:
        """Draws of latents, float32 `[B, c, h, w]`.

        Arguments:
            moments: μ and log σ², `[B, 2c, h, w]`.
            index: the global sample numbers, int64 `[B]`; None takes the means.
        """
        mean, logvar = moments.to(torch.float32).chunk(2, dim=1)
        if index is None:
            return mean
        noise = Keys(0, index).normal("posterior", *mean.shape[1:])
        # as far as float32 can tell e^(½ logvar) from 0; the bounds are those of the paper's own code
        return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise

    def scaled(self, z: Tensor) -> Tensor:
        """(z − shift)·scale, `[B, c, h, w]`."""
        return (z - self.shift[:, None, None]) * self.scale[:, None, None]
