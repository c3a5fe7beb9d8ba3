"""The Inception Score, with the splits of torch-fidelity."""

import numpy as np
import torch
from torch import Tensor

from diffx.metrics.accumulators import Sums, announced
from diffx.metrics.base import ImageMetric, Inapplicable, Observation
from diffx.metrics.reference import Reference
from diffx.metrics.values import BLOCKS, Value, bias_at, block_of, jackknifed, unions


class InceptionScore(ImageMetric):
    r"""How sure the extractor is of each image's class, and how many classes there are: exp(E KL(p(y | x) ‖ p(y))).

    The mean over splits of the images. The splits are those of torch-fidelity: a permutation drawn with
    `numpy.random.RandomState(2020)`, cut into 10 runs of equal length. With the number of images known in advance the
    split of an image follows from its sample number, so that the sums of p and of Σ p log p per split are all that is
    kept, and the score equals torch-fidelity's with its defaults. Source: Salimans et al., *Improved Techniques for
    Training GANs*, arXiv 1606.03498, section 4. Use it when the extractor knows the classes of the data, beside a
    metric that looks at the data.

    Arguments:
        reference: what samples are compared with; the score needs its extractor only.
        splits: the number of splits; as many as images if there are fewer of these.
        shuffle_seed: the seed of the permutation before the cut, or `None` to cut in the order of the sample numbers.
    """

    split: Tensor

    def __init__(self, reference: Reference, splits: int = 10, shuffle_seed: int | None = 2020) -> None:
        super().__init__()
        extractor = reference.extractor
        if extractor.num_classes < 2:
            raise Inapplicable(f"extractor '{extractor.name}' knows no classes: choose one that does")
        self.name = extractor.named("is")
        self.total = reference.total
        self.splits = min(splits, self.total)
        self.shuffle_seed = shuffle_seed
        self.register_buffer("split", split_of(self.total, self.splits, shuffle_seed), persistent=False)
        cells = torch.zeros(BLOCKS, self.splits, dtype=torch.float64)
        self.sums = Sums(count=cells, negentropy=cells.clone(), p=cells[..., None].repeat(1, 1, extractor.num_classes))

    def update(self, seen: Observation) -> None:
        """Takes the logits of a batch in.

        Raises:
            ValueError: if a sample number is not below the announced total.
        """
        index = announced(seen.index, self.total)
        log_p = seen.logits.to(torch.float64).log_softmax(dim=1)
        p = log_p.exp()
        cell = block_of(index) * self.splits + self.split[index]
        member = torch.nn.functional.one_hot(cell, BLOCKS * self.splits).to(torch.float64)
        shape = (BLOCKS, self.splits)
        self.sums.update(
            count=member.sum(dim=0).reshape(shape),
            negentropy=(member.T @ (p * log_p).sum(dim=1)).reshape(shape),
            p=(member.T @ p).reshape(*shape, -1),
        )

    def compute(self) -> list[Value]:
        """One value: the mean score over the splits of all images seen."""
        sums = self.sums.totals()
        held = sums["count"].sum(dim=1) > 0
        blocks = [sums[name][held] for name in ("count", "negentropy", "p")]
        n, groups = int(blocks[0].sum()), int(held.sum())

        def scores(weights: Tensor) -> Tensor:
            return _score(*(torch.tensordot(weights.to(x), x, dims=1) for x in blocks)).cpu()

        value = scores(torch.ones(1, groups)).item()
        without = scores(unions(groups, groups - 1))
        bias = bias_at(value, without, scores(unions(groups, groups // 2)))
        order = "in sample order" if self.shuffle_seed is None else f"shuffled by RandomState({self.shuffle_seed})"
        method = f"mean over {self.splits} splits {order}; ± jackknife over {BLOCKS} blocks of images"
        return [jackknifed(self.name, value, without, n, method, self._note(n, value), bias)]

    def _note(self, n: int, value: float) -> str:
        if n == 0:
            return "undefined without images"
        if value != value:
            return "undefined: the logits are not finite, so the extractor's weights are damaged"
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
    held = count > 0
    return divergence.exp().where(held, 0).sum(dim=-1) / held.sum(dim=-1)
