"""Do the images show the class that was asked for?"""

import math

from torch import Tensor

from diffx.metrics.accumulators import Sums
from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.values import Value
from diffx.utils import DiffxError


class ClassConsistency(ImageMetric):
    """The share of images that the extractor's classifier takes for the class asked for.

    Images whose label is no class, as the null label of unconditional generation, do not count.

    Arguments:
        num_classes: the number K of classes.
        name: the name of the value.
    """

    def __init__(self, num_classes: int, name: str = "class_consistency") -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.sums = Sums(count=(), hits=())

    def update(self, seen: Observation) -> None:
        """Takes the logits and labels of a batch in.

        Raises:
            DiffxError: if there are no labels.
        """
        if seen.labels is None:
            raise DiffxError(f"{self.name} needs the labels asked for: give them, or leave the metric out")
        asked: Tensor = (seen.labels >= 0) & (seen.labels < self.num_classes)
        hits = asked & (seen.logits.argmax(dim=1) == seen.labels)
        self.sums.update(count=asked.sum(), hits=hits.sum())

    def compute(self) -> list[Value]:
        """One value between 0 and 1."""
        sums = self.sums.compute()
        n, hits = int(sums["count"]), int(sums["hits"])
        method = "share whose most probable class is the label asked for; ± binomial"
        if n == 0:
            return [Value(self.name, math.nan, None, 0, method, "undefined: no image was asked to be of a class")]
        share = hits / n
        return [Value(self.name, share, math.sqrt(share * (1 - share) / n), n, method)]

    def reset(self) -> None:
        """Forgets all images."""
        self.sums.reset()
