"""Conditioning on classes."""

import torch
from torch import Tensor

from diffx.conditioning.base import Conditioner
from diffx.utils import DiffxError, Keys


class LabelConditioner(Conditioner):
    """The class label, dropped now and then so that one network learns the conditional and the unconditional model.

    From *Classifier-Free Diffusion Guidance* (arXiv 2207.12598), algorithm 1; `dropout` is its p_uncond. The null
    label is `num_classes`.

    Arguments:
        num_classes: number of classes; labels are 0..num_classes-1.
        dropout: the probability, in [0, 1], that a training sample's label is replaced by the null label.

    Raises:
        DiffxError: if there are no classes, or `dropout` is no probability.
    """

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_classes < 1:
            raise DiffxError("the images have no labels to condition on; set conditioning=none")
        if not 0 <= dropout <= 1:
            raise DiffxError(f"conditioning.dropout is {dropout}; set it to a probability, between 0 and 1")
        self.num_classes = num_classes
        self.dropout = dropout

    def forward(self, batch: dict[str, Tensor], keys: Keys | None = None) -> dict[str, Tensor]:
        """`label`, int64 `[B]`, in 0..num_classes; see `Conditioner.forward`."""
        label = batch["label"]
        if keys is None:
            return {"label": label}
        return {"label": label.masked_fill(keys.uniform("label_drop") < self.dropout, self.num_classes)}

    def null(self, n: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """`n` null labels, int64 `[n]`."""
        return {"label": torch.full((n,), self.num_classes, dtype=torch.int64, device=device)}

    def check(self, label: int) -> None:
        """Accepts 0..num_classes-1; see `Conditioner.check`."""
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise DiffxError(f"there is no class {label!r}; choose a label from 0 to {self.num_classes - 1}")
