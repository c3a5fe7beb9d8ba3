r"""The Inception Score: exp(E_x KL(p(y | x) ‖ p(y))), the mean over splits of the images.

Source: Salimans et al., *Improved Techniques for Training GANs*, arXiv 1606.03498, section 4. The splits are those of
torch-fidelity: a permutation drawn with `numpy.random.RandomState(2020)`, cut into 10 runs of equal length. With the
number of images known in advance the split of an image follows from its sample number, so that the sums of p and of
Σ p log p per split are all that is kept, and the score equals torch-fidelity's with its defaults.
"""

import numpy as np
import torch
from torch import Tensor

from diffx.metrics.accumulators import Sums
from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.values import BLOCKS, Value, block_of, jackknife


class InceptionScore(ImageMetric):
    """The Inception Score over splits, with its jackknife standard error.

    Arguments:
        name: the name of the value, as `is` or `is_digits`.
        num_classes: the number K of classes of the extractor.
        total: the number of images; their sample numbers are 0 … total − 1.
        splits: the number of splits; as many as images if there are fewer of these.
        shuffle_seed: the seed of the permutation before the cut, or `None` to cut in the order of the sample numbers.
    """

    split: Tensor

    def __init__(
        self, name: str, num_classes: int, total: int, splits: int = 10, shuffle_seed: int | None = 2020
    ) -> None:
        super().__init__()
        self.name = name
        self.total = total
        self.splits = min(splits, total)
        self.shuffle_seed = shuffle_seed
        self.register_buffer("split", split_of(total, self.splits, shuffle_seed), persistent=False)
        cells = (BLOCKS, self.splits)
        self.sums = Sums(count=cells, negentropy=cells, p=(*cells, num_classes))

    def update(self, seen: Observation) -> None:
        """Takes the logits of a batch in.

        Raises:
            ValueError: if a sample number is not below `total`.
        """
        if len(seen.index) and int(seen.index.max()) >= self.total:
            raise ValueError(f"sample {int(seen.index.max())} is not among the {self.total} announced")
        log_p = seen.logits.to(torch.float64).log_softmax(dim=1)
        p = log_p.exp()
        cell = block_of(seen.index) * self.splits + self.split[seen.index]
        member = torch.nn.functional.one_hot(cell, BLOCKS * self.splits).to(torch.float64)
        shape = (BLOCKS, self.splits)
        self.sums.update(
            count=member.sum(dim=0).reshape(shape),
            negentropy=(member.T @ (p * log_p).sum(dim=1)).reshape(shape),
            p=(member.T @ p).reshape(*shape, -1),
        )

    def compute(self) -> list[Value]:
        """One value: the mean score over the splits of all images seen."""
        sums = self.sums.compute()
        count, negentropy, p = sums["count"], sums["negentropy"], sums["p"]
        n = int(count.sum())
        value = _score(count.sum(0), negentropy.sum(0), p.sum(0)).item()
        present = count.sum(dim=1) > 0
        without = _score(*(x.sum(0) - x[present] for x in (count, negentropy, p))) if n > 1 else torch.empty(0)
        order = "in sample order" if self.shuffle_seed is None else f"shuffled by RandomState({self.shuffle_seed})"
        method = f"mean over {self.splits} splits {order}; ± jackknife over {BLOCKS} blocks of images"
        return [Value(self.name, value, jackknife(without), n, method, self._note(n, value))]

    def reset(self) -> None:
        """Forgets all images."""
        self.sums.reset()

    def _note(self, n: int, value: float) -> str:
        if n == 0:
            return "undefined without images"
        if value != value:
            return "the logits are not finite: the extractor's weights are damaged"
        return "" if n == self.total else f"{n} images instead of {self.total}: the splits are uneven"


def split_of(total: int, splits: int, shuffle_seed: int | None) -> Tensor:
    """The split of each sample number, int64 `[total]`, as torch-fidelity cuts them."""
    order = np.arange(total) if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(total)
    bounds = np.arange(1, splits) * total // splits
    split = np.empty(total, dtype=np.int64)
    split[order] = np.searchsorted(bounds, np.arange(total), side="right")
    return torch.from_numpy(split)


def _score(count: Tensor, negentropy: Tensor, p: Tensor) -> Tensor:
    # [..., splits]; a split that lost all its images does not vote
    mean_p = p / count[..., None]
    divergence = negentropy / count - torch.xlogy(mean_p, mean_p).sum(dim=-1)
    present = count > 0
    return divergence.exp().where(present, 0).sum(dim=-1) / present.sum(dim=-1)
