"""scikit-learn's handwritten digits: small enough to train on in seconds, and always there."""

import torch

from diffx.data.base import SplitName, TensorImages
from diffx.data.held_out import held_out
from diffx.data.map_source import Found, MapSource

_COUNT = 1797
_TEST = 360


class Digits(MapSource):
    """1,797 grey 8×8 images of ten digits, from the package scikit-learn (Alpaydin and Kaynak, UCI 1998).

    The published values 0..16 become round(v · 255 / 16), so that 0 is 0 and 16 is 255. The set comes without splits:
    360 images, each class's share of them, are held out for the test; the same ones everywhere and always.

    Arguments:
        settings: as `DataSource`.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def prepare(self) -> None:
        """Nothing to download."""

    def inspect(self) -> Found:
        """What is known of the set."""
        return Found("scikit-learn", 1, 8, 8, 10, _COUNT - _TEST, _TEST)

    def load(self, name: SplitName) -> TensorImages:
        """Reads one split from the installed package."""
        from sklearn.datasets import load_digits  # slow to import

        values, digits = load_digits(return_X_y=True)
        labels = torch.from_numpy(digits).to(torch.int64)
        images = (torch.from_numpy(values).to(torch.int64) * 255 + 8) // 16
        mine = held_out(labels, torch.arange(len(labels)), _TEST) == (name == "test")
        return TensorImages(images.to(torch.uint8).reshape(-1, 1, 8, 8)[mine], labels[mine])
