"""What every network of a denoiser offers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """A network F(x, logSNR, label) that works on images or latents.

    A new one writes `forward`, free of branches on the data so that `torch.compile` sees one graph, and treats every
    sample of the batch on its own.

    Attributes:
        augment_labels: how many labels of an augmentation the network embeds; with some, `forward` takes `augment`,
            shape `[B, augment_labels]`, where None is zero for all.
        parts: the modules of the network that take nearly all of its time, each called once with tensors and giving
            one, such as its blocks; `speed_up` compiles and recomputes by them. Empty if the network is one part.
    """

    augment_labels: int = 0
    parts: Sequence[nn.Module] = ()

    @abstractmethod
    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Applies the network.

        Arguments:
            x: the input, already scaled by c_in, shape `[B, C, H, W]`.
            logsnr: the noise levels log(α²/σ²), shape `[B]`.
            label: the classes, int64 `[B]` in [0, num_classes], where num_classes is the null class; None is the null
                class for all. The range is not checked, which would make the GPU wait.

        Returns:
            The output, shape `[B, out_channels, H, W]`.

        Raises:
            DiffxError: if the number of channels or the spatial size does not fit the network.
        """
