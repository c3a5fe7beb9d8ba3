"""Are the images copies of training images?"""

import math

import torch
from torch import Tensor

from diffx.metrics.accumulators import Sums, announced
from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed

_CHUNK = 2**24  # elements of float64: 128 MiB
_METHOD = "RMS pixel difference, on [−1, 1], to the nearest training image"


class NearestDistance(ImageMetric):
    """The distance in pixels to the nearest training image, beside that of held-out images.

    min_j ‖x − y_j‖ / √dim, on pixels in [−1, 1]. A model that generalizes is as far from the training images as unseen
    images are (`nn_ratio` near 1); one that memorizes is nearer (`nn_ratio` near 0). Source: the search for copies of
    Carlini et al., *Extracting Training Data from Diffusion Models*, arXiv 2301.13188. Use it when the training
    set is small, or the training long.

    Arguments:
        reference: what samples are compared with: its training images and, for the ratio, held-out ones.
        closest: how many pairs of a sample and its nearest training image `closest` tells.
    """

    training_images: Tensor

    def __init__(self, reference: Reference, closest: int = 16) -> None:
        super().__init__()
        self.total = reference.total
        self.pairs = closest
        self.register_buffer("training_images", reference.training_images, persistent=False)
        self.heldout = reference.heldout_images
        self._heldout: Value | None = None
        # 0 stands for samples that were not seen, so that ranks can be added up
        count = torch.zeros(self.total, dtype=torch.int64)
        self.sums = Sums(distance=torch.zeros(self.total, dtype=torch.float64), neighbour=count)

    def update(self, seen: Observation) -> None:
        """Takes a batch of images in.

        Raises:
            ValueError: if a sample number is not below the announced total.
        """
        index = announced(seen.index, self.total)
        distance, neighbour = nearest(seen.images, self.training_images)
        self.sums["distance"][index] = distance
        self.sums["neighbour"][index] = neighbour + 1

    def compute(self) -> list[Value]:
        """The values `nn_distance` and, with held-out images, `nn_distance_heldout` and `nn_ratio`."""
        samples, _, distance = self._found()
        method = f"{_METHOD}; ± jackknife over {BLOCKS} blocks of images"
        note = "" if len(samples) else "undefined without images"
        mean, without = _mean(distance, block_of(samples))
        values = [jackknifed("nn_distance", mean, without, len(samples), method, note, 0.0)]
        if self.heldout is None:
            return values
        if self._heldout is None:
            d = nearest(self.heldout.to(self.training_images.device), self.training_images)[0].cpu()
            mean, without = _mean(d, block_of(torch.arange(len(d))))
            self._heldout = jackknifed("nn_distance_heldout", mean, without, len(d), method, bias=0.0)
        return [*values, self._heldout, _ratio(values[0], self._heldout)]

    def closest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of a sample and a training image that are most alike, over all ranks: all of them have to call it.

        Returns:
            The samples' numbers, int64 `[M]`, the positions of the training images, int64 `[M]`, and the distances,
            float64 `[M]`, the smallest first, on the CPU.
        """
        samples, neighbours, distance = self._found()
        order = distance.argsort(stable=True)[: self.pairs]
        return samples[order], neighbours[order], distance[order]

    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        totals = {name: total.cpu() for name, total in self.sums.totals().items()}
        samples = totals["neighbour"].nonzero()[:, 0]
        return samples, totals["neighbour"][samples] - 1, totals["distance"][samples]


def nearest(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """The root mean square difference to the nearest training image.

    Exact: the squares of differences of integers are summed in float64. Training images pass by in chunks.

    Arguments:
        images: uint8 `[B, C, H, W]`.
        training: uint8 `[N, C, H, W]`, on any device.

    Returns:
        Distances per pixel value, on the scale where images lie in [−1, 1], float64 `[B]`, and the positions of the
        nearest training images, int64 `[B]`.
    """
    x = images.flatten(1).to(torch.float64)
    dim = x.shape[1]
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    where = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    start = 0
    for chunk in training.split(max(_CHUNK // max(dim, len(x)), 1)):
        y = chunk.flatten(1).to(x)
        distance, position = (y.square().sum(dim=1) - 2 * x @ y.T).min(dim=1)
        nearer = distance < best
        best, where = torch.where(nearer, distance, best), torch.where(nearer, position + start, where)
        start += len(chunk)
    return ((best + x.square().sum(dim=1)) / dim).sqrt() / 127.5, where


def _mean(distance: Tensor, block: Tensor) -> tuple[float, Tensor]:
    """The mean of all, and without one block each."""
    if not len(distance):
        return math.nan, distance
    member = torch.nn.functional.one_hot(block, BLOCKS).to(distance.dtype)
    count, sums = member.sum(dim=0), distance @ member
    held = count > 0
    return distance.mean().item(), (sums.sum() - sums[held]) / (len(distance) - count[held])


def _ratio(images: Value, heldout: Value) -> Value:
    ratio = images.value / heldout.value if heldout.value else math.nan
    stderr, blocks = None, None
    if images.stderr is not None and heldout.stderr is not None and images.value and heldout.value:
        stderr = ratio * math.hypot(images.stderr / images.value, heldout.stderr / heldout.value)
        blocks = images.blocks and tuple(b / heldout.value for b in images.blocks)
    method = "nn_distance / nn_distance_heldout; near 0 where training images are copied"
    return Value("nn_ratio", ratio, stderr, images.n, method, blocks=blocks)
