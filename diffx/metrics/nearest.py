"""Are the images copies of training images?"""

import math

import torch
from torch import Tensor

from diffx.metrics.accumulators import Sums
from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.values import Value

_CHUNK = 2**24  # elements of float64: 128 MiB
_METHOD = "RMS pixel difference, on [−1, 1], to the nearest training image; ± of the mean"


class NearestDistance(ImageMetric):
    """The distance in pixels to the nearest training image, beside that of held-out images.

    A model that generalizes is as far from the training images as unseen images are (`nn_ratio` near 1); one that
    memorizes is nearer (`nn_ratio` near 0).

    Arguments:
        training: the training images, uint8 `[N, C, H, W]`.
        heldout: images the model has not seen, uint8 `[M, C, H, W]`, or `None` for the plain distance alone.
    """

    def __init__(self, training: Tensor, heldout: Tensor | None = None) -> None:
        super().__init__()
        self.training_images = training
        self.heldout_images = heldout
        self._heldout: tuple[float, float | None, int] | None = None
        self.sums = Sums(count=(), distance=(), square=())

    def update(self, seen: Observation) -> None:
        """Takes a batch of images in."""
        distance = nearest_distance(seen.images, self.training_images)
        self.sums.update(count=torch.tensor(len(distance)), distance=distance.sum(), square=distance.square().sum())

    def compute(self) -> list[Value]:
        """The values `nn_distance` and, with held-out images, `nn_distance_heldout` and `nn_ratio`."""
        sums = self.sums.compute()
        mean, stderr, n = _mean(sums["count"].item(), sums["distance"].item(), sums["square"].item())
        note = "" if n else "undefined without images"
        values = [Value("nn_distance", mean, stderr, n, _METHOD, note)]
        if self.heldout_images is None:
            return values
        if self._heldout is None:
            d = nearest_distance(self.heldout_images.to(sums["count"].device), self.training_images)
            self._heldout = _mean(len(d), d.sum().item(), d.square().sum().item())
        mean_0, stderr_0, n_0 = self._heldout
        values.append(Value("nn_distance_heldout", mean_0, stderr_0, n_0, _METHOD))
        return [*values, _ratio(values[0], values[1])]

    def reset(self) -> None:
        """Forgets all images but the training and held-out ones."""
        self.sums.reset()


def nearest_distance(images: Tensor, training: Tensor) -> Tensor:
    """The root mean square difference to the nearest training image.

    Exact: the squares of differences of integers are summed in float64. Training images pass by in chunks.

    Arguments:
        images: uint8 `[B, C, H, W]`.
        training: uint8 `[N, C, H, W]`, on any device.

    Returns:
        Distances per pixel value, on the scale where images lie in [−1, 1], float64 `[B]`.
    """
    x = images.flatten(1).to(torch.float64)
    dim = x.shape[1]
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    for chunk in training.split(max(_CHUNK // max(dim, len(x)), 1)):
        y = chunk.flatten(1).to(x)
        best = torch.minimum(best, (y.square().sum(dim=1) - 2 * x @ y.T).amin(dim=1))
    return ((best + x.square().sum(dim=1)) / dim).sqrt() / 127.5


def _mean(count: float, total: float, square: float) -> tuple[float, float | None, int]:
    if count == 0:
        return math.nan, None, 0
    mean = total / count
    variance = max(square / count - mean**2, 0.0)
    return mean, math.sqrt(variance / (count - 1)) if count > 1 else None, int(count)


def _ratio(images: Value, heldout: Value) -> Value:
    ratio = images.value / heldout.value if heldout.value else math.nan
    stderr = None
    if images.stderr is not None and heldout.stderr is not None and images.value and heldout.value:
        stderr = ratio * math.hypot(images.stderr / images.value, heldout.stderr / heldout.value)
    method = "nn_distance / nn_distance_heldout; near 0 where training images are copied"
    return Value("nn_ratio", ratio, stderr, images.n, method)
