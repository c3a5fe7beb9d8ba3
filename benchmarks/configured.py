"""What the shipped configs describe, built for a benchmark, and data of any shape."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from diffx.cli.paths import config_dir
from diffx.data.base import SplitName, TensorImages
from diffx.data.map_source import Found, MapSource


def backbone(name: str, channels: int, image_size: int, num_classes: int, **changes: Any) -> nn.Module:
    """The network of configs/backbone/<name>.yaml for images `[channels, image_size, image_size]`."""
    data = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
    config = OmegaConf.create({"data": data, "backbone": OmegaConf.load(config_dir() / "backbone" / f"{name}.yaml")})
    return instantiate(config.backbone, **changes)


class Noise(MapSource):
    """Images of noise in memory: what they show does not change the time.

    Arguments:
        count: how many.
        settings: as `DataSource`.
    """

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(name="noise", flip=False, num_workers=0, **settings)
        self.count = count

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(k) for k in range(self.num_classes))

    def prepare(self) -> None:
        pass

    def inspect(self) -> Found:
        size = self.image_size
        return Found("noise", self.channels, size, size, self.num_classes, self.count, self.count)

    def load(self, name: SplitName) -> TensorImages:
        draw = torch.Generator().manual_seed(0)
        shape = (self.count, self.channels, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        return TensorImages(images, torch.randint(0, max(self.num_classes, 1), (self.count,), generator=draw))
