"""All metrics of one set of images: one pass, one run of the extractor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffx.metrics.accumulators import Sums
from diffx.metrics.base import ImageMetric, Observation, sums_of
from diffx.metrics.extractors import Extractor, extract
from diffx.metrics.values import Value


class ImageMetrics(nn.Module):
    """Metrics of images that come batch by batch, on any number of ranks.

    Keep it out of modules whose checkpoints should stay small: it holds the extractor's weights.

    Arguments:
        extractor: maps images to features and logits.
        metrics: what to measure.
    """

    def __init__(self, extractor: Extractor, metrics: Sequence[ImageMetric]) -> None:
        super().__init__()
        self.extractor = extractor
        self.metrics = nn.ModuleList(metrics)

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor | None, index: Tensor) -> None:
        """Takes a batch in.

        Arguments:
            images: uint8 `[B, C, H, W]`.
            labels: the classes asked for, int64 `[B]`, or `None`.
            index: the global sample numbers, int64 `[B]`: each number once over all batches and ranks.

        Raises:
            TypeError: if the images are not uint8 `[B, C, H, W]`.
            ValueError: if a sample number is not below the announced total.
            DiffxError: if a metric needs labels and there are none.
        """
        features, logits = extract(self.extractor, images)
        device = features.device
        labels = labels if labels is None else labels.to(device)
        seen = Observation(images.to(device), labels, index.to(device), features, logits)
        for metric in self._metrics():
            metric.update(seen)

    @torch.no_grad()
    def compute(self) -> dict[str, Value]:
        """The values over all images of all ranks, by name; every rank has to call it and gets the same."""
        values = [value for metric in self._metrics() for value in metric.compute()]
        return {value.name: value for value in values}

    def reset(self) -> None:
        """Forgets all images."""
        for metric in self._metrics():
            metric.reset()

    def state(self) -> dict[str, Tensor]:
        """All that was seen on all ranks, on the CPU, to go on from; every rank has to call it and gets the same."""
        totals = {path: sums.totals() for path, sums in self._sums().items()}
        return {
            f"{path}.{name}": x.detach().cpu().clone() for path, found in totals.items() for name, x in found.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state`. Over several ranks one has to load it, and the others to `reset`.

        Raises:
            ValueError: if it is of other metrics or another number of images; nothing has been seen then.
        """
        sums = self._sums()
        try:
            if state.keys() != {f"{path}.{name}" for path, part in sums.items() for name in part.names}:
                raise ValueError("the saved sums are of other metrics: start anew")
            for path, part in sums.items():
                part.load({name: state[f"{path}.{name}"] for name in part.names})
        except ValueError:
            self.reset()
            raise

    def _sums(self) -> dict[str, Sums]:
        found = {}
        for i, metric in enumerate(self._metrics()):
            # the class beside the number: sums of one metric must not pass for those of another
            found |= {f"{i}.{type(metric).__name__}.{path}": sums for path, sums in sums_of(metric).items()}
        return found

    def _metrics(self) -> list[ImageMetric]:
        return [metric for metric in self.metrics.children() if isinstance(metric, ImageMetric)]
