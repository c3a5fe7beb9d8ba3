"""Trains the small KL autoencoder."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.nn import functional as F

from diffx.autoencoders.kl import KL
from diffx.autoencoders.pixels import Pixels
from diffx.utils import Keys


def fit_kl(
    autoencoder: KL,
    batches: Iterable[dict[str, Tensor]],
    held_out: Tensor,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    lr_schedule: Callable[[int], float],
    *,
    max_steps: int,
    loss: Literal["l1", "mse"] = "l1",
    kl_weight: float = 1e-6,
    seed: int = 0,
    device: torch.device | str = "cpu",
    scale_images: int = 5_000,
    progress: bool = True,
) -> KL:
    r"""Reconstruction with a faint pull of the latents towards N(0, I) (Rombach et al., arXiv 2112.10752, section 3.1).

    Per image with D numbers the loss is (Σ |x̂ − x|^p + w·KL(N(μ, σ²) ‖ N(0, I))) / D with x in [−1, 1]; the paper's
    adversarial and perceptual terms are left out. The latents' mean and standard deviation per channel, over the
    next `scale_images` images of the stream, become shift and scale.

    Arguments:
        autoencoder: what is trained, in place.
        batches: the training stream: `x`, uint8 `[b, C, H, W]`, and `index`, int64 `[b]`.
        held_out: other images to measure the PSNR on, uint8 `[N, C, H, W]`.
        optimizer: makes the optimizer from the parameters.
        lr_schedule: factor of the learning rate per step.
        max_steps: optimizer steps, ≥ 1.
        loss: `l1` (p = 1) or `mse` (p = 2).
        kl_weight: w.
        seed: the seed of the draws from the posterior.
        device: where to train.
        scale_images: how many images the scale of the latents is measured on.
        progress: whether to show a progress bar.

    Returns:
        The autoencoder on the CPU, frozen; `about` tells loss, steps and PSNR.
    """
    autoencoder.to(device).train()
    rule = optimizer(autoencoder.parameters())
    decay = torch.optim.lr_scheduler.LambdaLR(rule, lr_schedule)
    distance = {"l1": F.l1_loss, "mse": F.mse_loss}[loss]
    stream = iter(batches)
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("training an autoencoder", total=max_steps, loss=math.nan)
        for step, batch in enumerate(itertools.islice(stream, max_steps)):
            x = Pixels().encode({"x": batch["x"].to(device)}).contiguous(memory_format=torch.channels_last)
            mean, logvar = autoencoder.moments(x).chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            noise = Keys(seed, batch["index"].to(device)).normal("fit/posterior", *mean.shape[1:])
            estimate = autoencoder.images(mean + (0.5 * logvar).exp() * noise)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / x.numel()
            total = distance(estimate, x) + kl_weight * kl
            rule.zero_grad()
            total.backward()
            rule.step()
            decay.step()
            if step % 20 == 0 or step == max_steps - 1:
                bar.update(task, completed=step + 1, loss=total.item())
    autoencoder.requires_grad_(False).eval()
    _set_scale(autoencoder, stream, scale_images, device)
    autoencoder.about |= {
        "loss": loss,
        "kl_weight": kl_weight,
        "steps": max_steps,
        "seed": seed,
        "psnr": psnr(autoencoder, held_out.to(device)),
        "held_out": len(held_out),
    }
    return autoencoder.cpu()


@torch.no_grad()
def psnr(autoencoder: KL, images: Tensor) -> float:
    """The peak signal-to-noise ratio of reconstructions in decibels, 10 log₁₀(255² / MSE) with the MSE of all images.

    Arguments:
        autoencoder: reconstructs from the mean of the posterior.
        images: uint8 `[N, C, H, W]`.
    """
    square = torch.zeros((), dtype=torch.float64)
    for x in images.split(autoencoder.batch_size):
        again = autoencoder.decode(autoencoder.encode({"x": x}))
        square += (again.double() - x.double()).square().sum().cpu()
    return 10 * math.log10(255**2 * images.numel() / max(square.item(), 1e-12))


@torch.no_grad()
def _set_scale(autoencoder: KL, stream: Iterable[dict[str, Tensor]], images: int, device: torch.device | str) -> None:
    count, latents = 0, []
    for batch in stream:
        drawn = autoencoder.drawn(autoencoder.encoded(batch["x"].to(device)), batch["index"].to(device))
        latents.append(drawn.double().cpu())
        count += len(drawn)
        if count >= images:
            break
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3))
    autoencoder.shift.copy_(mean)
    autoencoder.scale.copy_(1 / std)
