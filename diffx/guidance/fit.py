"""Trains the classifier that classifier guidance stands on."""

import itertools
from collections.abc import Callable, Iterable

import torch
from rich.progress import Progress, TextColumn
from torch import Tensor, nn

from diffx.autoencoders import Autoencoder
from diffx.data import DataSource
from diffx.guidance.noisy_classifier import NoisyClassifier
from diffx.schedules import Schedule
from diffx.time_samplers import TimeSampler
from diffx.utils import Keys, expand_as

EDGES = tuple(range(-10, 11, 2))
"""The ends of the bins of logSNR by which accuracy is told: from hardly a trace of the image to hardly any noise."""


def fit_noisy_classifier(
    classifier: NoisyClassifier,
    source: DataSource,
    autoencoder: Autoencoder,
    schedule: Schedule,
    time_sampler: TimeSampler,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    lr_schedule: Callable[[int], float],
    *,
    max_steps: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> NoisyClassifier:
    r"""Cross-entropy of noisy images, E_{t, z} [−log p(y | x_t)] (Dhariwal and Nichol, arXiv 2105.05233, Sec. 4).

    The images are those of the training stream, mirrored if the data say so; order, times and noise follow from the
    seed. The classifier sees what the denoiser sees: x_t of the autoencoder's latents.

    Arguments:
        classifier: what is trained, in place.
        source: labelled data; `source.batch_size` images per step.
        autoencoder: that of the denoiser that will be guided, frozen; `Pixels` for none.
        schedule: the forward process.
        time_sampler: density of the noise levels, on that schedule.
        optimizer: makes the optimizer from the parameters.
        lr_schedule: factor of the learning rate per step.
        max_steps: optimizer steps, ≥ 1.
        seed: the seed of all random numbers but the initial weights and drop-out, which are torch's.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The classifier on the CPU, frozen; `about` tells data, schedule, steps and held-out accuracy.
    """
    classifier.to(device).train()
    autoencoder.to(device).requires_grad_(False)
    rule = optimizer(classifier.parameters())
    decay = torch.optim.lr_scheduler.LambdaLR(rule, lr_schedule)
    low, high = float("inf"), -float("inf")
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(f"training a classifier of noisy {source.name}", total=max_steps, loss=float("nan"))
        for step, batch in enumerate(itertools.islice(source.train_loader(seed), max_steps)):
            batch = {name: value.to(device) for name, value in batch.items()}
            keys = Keys(seed, batch["index"], total=source.batch_size)
            t, correction = time_sampler(schedule, keys)
            level = schedule.logsnr(t)
            low, high = min(low, level.min().item()), max(high, level.max().item())
            with torch.no_grad():
                x_t = noisy(autoencoder.encode(batch), level, keys)
            losses = nn.functional.cross_entropy(classifier(x_t, level), batch["label"], reduction="none")
            loss = (correction * losses).mean()
            rule.zero_grad()
            loss.backward()
            rule.step()
            decay.step()
            if step % 20 == 0 or step == max_steps - 1:
                bar.update(task, completed=step + 1, loss=loss.item())
    classifier.cpu().requires_grad_(False).eval()
    autoencoder.cpu()
    images = source.split("train")
    classifier.logsnr_min, classifier.logsnr_max = low, high
    classifier.about |= {
        "data": source.name,
        # of data that were encoded before, the images may be elsewhere
        "fingerprint": images.fingerprint() if len(images) else "",
        "autoencoder": type(autoencoder).__name__,
        "schedule": type(schedule).__name__,
        "steps": max_steps,
        "batch_size": source.batch_size,
        "seed": seed,
        "accuracy": accuracy_by_logsnr(classifier, source, autoencoder, seed),
    }
    return classifier


@torch.no_grad()
def accuracy_by_logsnr(
    classifier: NoisyClassifier, source: DataSource, autoencoder: Autoencoder, seed: int = 0, images: int = 2000
) -> dict[str, float]:
    """The share of held-out images whose most probable class is their label.

    Arguments:
        classifier: the classifier, in evaluation mode, on the CPU.
        source: its data.
        autoencoder: gives what the classifier sees, on the CPU.
        seed: the seed of the noise.
        images: how many images of the test split at most, spread over all of it.

    Returns:
        By bins of logSNR such as `"-2..0"`, within which the levels are uniform, the noisiest first: shares in [0, 1].
        Empty where there are no images.
    """
    split = source.split("test")
    count = min(images, len(split))
    if not count:
        return {}
    index = torch.arange(count) * len(split) // count
    shares = {}
    for low, high in itertools.pairwise(EDGES):
        hits = 0
        for some in index.split(500):
            batch, keys = split.get(some), Keys(seed, some, step=low)
            level = low + (high - low) * keys.uniform("held-out/level")
            logits = classifier(noisy(autoencoder.encode(batch | {"index": some}), level, keys), level)
            hits += int((logits.argmax(dim=1) == batch["label"]).sum())
        shares[f"{low}..{high}"] = hits / count
    return shares


def noisy(x: Tensor, level: Tensor, keys: Keys) -> Tensor:
    """ᾱ·x + σ̄·z at the logSNR `level` `[B]`, with ᾱ² = sigmoid(logSNR) = 1 − σ̄²; shape of x, `[B, C, H, W]`."""
    alpha, sigma = (expand_as(torch.sigmoid(sign * level).sqrt(), x) for sign in (1, -1))
    return alpha * x + sigma * keys.normal("noise", *x.shape[1:])
