"""Fits the classifier that metrics on small labelled images stand on."""

import torch
from rich.progress import Progress
from torch import Tensor, nn

from diffx.metrics.extractors import Classifier, extract
from diffx.utils import DiffxError, Keys
from diffx.utils.random import permutation

_IMAGES = 240_000


def fit_classifier(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    name: str,
    data: str = "",
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    shift: int = 1,
    min_accuracy: float = 0.97,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Classifier:
    """A classifier of the training images, tested on the held-out ones.

    AdamW with a one-cycle learning rate on randomly shifted images. Everything random follows from the seed, so that
    the result repeats on a CPU with the same number of threads.

    Arguments:
        train_images: uint8 `[N, C, H, W]`, square.
        train_labels: int64 `[N]`, the classes 0 … K − 1.
        test_images: uint8 `[M, C, H, W]`.
        test_labels: int64 `[M]`.
        name: what the metrics are called after, as in `fd_digits`.
        data: the name of the data; `name` by default.
        seed: the seed of weights, order and shifts.
        epochs: passes over the training images; by default enough to see 240,000 of them, between 4 and 60.
        batch_size: images per step; the last ones of an epoch that do not fill a batch are left out.
        learning_rate: the largest learning rate.
        weight_decay: AdamW's.
        shift: images are shifted by up to so many pixels, the border filled with zeros.
        min_accuracy: the least held-out accuracy that is accepted.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The classifier on the CPU, with its held-out `accuracy`.

    Raises:
        DiffxError: if images and labels do not fit together, or the accuracy stays below `min_accuracy`.
    """
    _check(train_images, train_labels)
    _check(test_images, test_labels)
    if train_labels.min() < 0 or train_labels.max() < 1:
        raise DiffxError("a classifier needs labels of at least two classes, 0 … K − 1: choose labelled data")
    count, channels, image_size, _ = train_images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(name, channels, image_size, int(train_labels.max()) + 1, data).to(device)
    epochs = min(max(_IMAGES // count, 4), 60) if epochs is None else epochs
    batch_size = min(batch_size, count)
    steps = epochs * (count // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"fitting classifier '{name}'", total=steps)
        for epoch in range(epochs):
            order = permutation(seed, "fit/order", epoch, count)
            classifier.train()
            for batch in order[: count // batch_size * batch_size].split(batch_size):
                images = _shifted(train_images[batch], Keys(seed, batch, epoch), shift)
                logits = classifier(images.to(device))[1]
                loss = nn.functional.cross_entropy(logits, train_labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.advance(task)
    classifier.accuracy = accuracy(classifier, test_images, test_labels)
    if not classifier.accuracy >= min_accuracy:
        raise DiffxError(
            f"the classifier '{name}' reaches a held-out accuracy of {classifier.accuracy:.4f} only, and metrics on "
            f"a weak classifier mislead: train it longer, or accept it with a min_accuracy below {min_accuracy}"
        )
    return classifier.cpu().requires_grad_(False).eval()


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images whose most probable class is their label.

    Arguments:
        classifier: the classifier.
        images: uint8 `[M, C, H, W]`.
        labels: int64 `[M]`.
    """
    hits = 0
    for x, y in zip(images.split(512), labels.split(512), strict=True):
        hits += int((extract(classifier, x)[1].argmax(dim=1).cpu() == y.cpu()).sum())
    return hits / len(images)


def _check(images: Tensor, labels: Tensor) -> None:
    square = images.ndim == 4 and images.shape[2] == images.shape[3]
    if images.dtype != torch.uint8 or not square or labels.shape != images.shape[:1] or len(labels) == 0:
        raise DiffxError(
            "a classifier is fitted to square uint8 images [N, C, H, W] with labels [N], not to images "
            f"{images.dtype} {list(images.shape)} with labels {list(labels.shape)}: choose labelled image data"
        )


def _shifted(images: Tensor, keys: Keys, shift: int) -> Tensor:
    size = images.shape[-1]
    offset = (keys.uniform("fit/shift", 2) * (2 * shift + 1)).long()
    rows, columns = (offset[:, i, None] + torch.arange(size) for i in range(2))
    padded = nn.functional.pad(images, (shift,) * 4)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
