"""Bits per dimension of images under a model."""

import math

import torch
import torch.distributed as dist

from diffx.autoencoders import Autoencoder
from diffx.conditioning import Conditioner
from diffx.data import Images
from diffx.denoisers import Denoiser
from diffx.likelihood import Likelihood
from diffx.metrics import Value
from diffx.utils import Keys


def bits_per_dim(
    likelihood: Likelihood,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    conditioner: Conditioner,
    images: Images,
    total: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> Value:
    """How many bits per dimension the model needs for images, mean and standard error over them.

    Arguments:
        likelihood: the bound, or the exact likelihood of the probability flow.
        denoiser: the model itself, neither guided nor thresholded.
        autoencoder: gives what the model models.
        conditioner: gives the conditions.
        images: a split that was not trained on.
        total: how many of them, the first ones.
        batch_size: images per batch on each rank.
        device: where to compute.
        rank: this process.
        world_size: number of processes; all of them have to call it.
        seed: the seed of times, noise and probes.
    """
    total, bits = min(total, len(images)), []
    for index in torch.arange(total)[rank::world_size].split(batch_size):
        batch = {name: value.to(device) for name, value in images.get(index).items()}
        x, keys = autoencoder.encode(batch), Keys(seed, index.to(device))
        nats = likelihood(denoiser, x, keys, **conditioner({"label": batch["label"]}))["nats"]
        bits.append(nats.double() / (x[0].numel() * math.log(2)))
    flat = torch.cat(bits) if bits else torch.empty(0, dtype=torch.float64, device=device)
    sums = torch.stack([flat.sum(), flat.square().sum()])
    if world_size > 1:
        dist.all_reduce(sums)
    mean = (sums[0] / total).item()
    stderr = math.sqrt(max(sums[1].item() / total - mean**2, 0.0) / max(total - 1, 1))
    return Value("bpd", mean, stderr, total, f"{type(likelihood).__name__}; ± standard error over images")
