"""Do the images show the class that was asked for?"""

import math

import torch
from torch import Tensor

from diffx.metrics.accumulators import Sums
from diffx.metrics.base import ImageMetric, Inapplicable, Observation
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, block_of, jackknifed
from diffx.utils import DiffxError


class ClassConsistency(ImageMetric):
    """The share of images that the extractor's classifier takes for the class asked for.

    Σ 1(argmax p(y | x) = label) / n. Images whose label is no class, as the null label of unconditional generation, do
    not count. Source: Ravuri and Vinyals, *Classification Accuracy Score for Conditional Generative Models*, arXiv
    1905.10887, turned round: there a classifier is trained on samples, here it is given. Use it when samples are
    conditional and the extractor is a classifier of the data's classes.

    Arguments:
        reference: what samples are compared with; the share needs its extractor and number of classes only.
        name: the name of the value.
    """

    def __init__(self, reference: Reference, name: str = "class_consistency") -> None:
        super().__init__()
        extractor, classes = reference.extractor, reference.num_classes
        if not 0 < classes == extractor.num_classes:
            raise Inapplicable(
                f"extractor '{extractor.name}' knows {extractor.num_classes} classes and the data have {classes}: "
                "choose a classifier fitted to the data"
            )
        self.name = name
        self.num_classes = classes
        zeros = torch.zeros(BLOCKS, dtype=torch.float64)
        self.sums = Sums(count=zeros, hits=zeros.clone())

    def update(self, seen: Observation) -> None:
        """Takes the logits and labels of a batch in.

        Raises:
            DiffxError: if there are no labels.
        """
        labels = labels_of(seen, self.name)
        asked = (labels >= 0) & (labels < self.num_classes)
        hits = asked & (seen.logits.argmax(dim=1) == labels)
        block = torch.nn.functional.one_hot(block_of(seen.index), BLOCKS).to(torch.float64)
        self.sums.update(count=asked.to(block) @ block, hits=hits.to(block) @ block)

    def compute(self) -> list[Value]:
        """One value between 0 and 1."""
        sums = self.sums.totals()
        count, hits = sums["count"].cpu(), sums["hits"].cpu()
        n = int(count.sum())
        method = f"share whose most probable class is the label asked for; ± jackknife over {BLOCKS} blocks of images"
        if n == 0:
            return [Value(self.name, math.nan, None, 0, method, "undefined: no image was asked to be of a class")]
        held = count > 0
        without = (hits.sum() - hits[held]) / (n - count[held])
        return [jackknifed(self.name, hits.sum().item() / n, without, n, method, bias=0.0)]


def labels_of(seen: Observation, name: str) -> Tensor:
    """The labels of a batch.

    Raises:
        DiffxError: if there are none.
    """
    if seen.labels is None:
        raise DiffxError(f"{name} needs the labels asked for: give them, or leave the metric out")
    return seen.labels
