"""DINOv2's image encoder, as torch-fidelity has it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffx.metrics.extractors.base import Extractor, check_grey_or_rgb
from diffx.metrics.extractors.weights import sha256_of
from diffx.utils import DiffxError, nearest

_DEFAULT = "vit-l-14"
_CODE = "https://github.com/facebookresearch/dinov2"
_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"


class DINOv2(Extractor):
    """The image encoder of DINOv2: features that agree best with people's judgement of images.

    Code and weights are those of the authors, through torch.hub. The preprocessing is torch-fidelity's, a bilinear
    resize to 224 pixels that imitates TensorFlow 1; the code of the study that recommends DINOv2 (dgm-eval) resizes by
    bicubic interpolation, so that its numbers are near these but not these. Source: Stein et al., *Exposing Flaws of
    Generative Model Evaluation Metrics and Their Unfair Treatment of Diffusion Models*, arXiv 2306.04675, with the
    network of Oquab et al., arXiv 2304.07193. Use it when images are natural and samples are good: Inception is blind
    to much of what people see.

    Arguments:
        network: `vit-l-14`, the study's (metrics are called `fd_dinov2`), `vit-s-14`, `vit-b-14` or `vit-g-14`
            (`fd_dinov2_vit_s_14` and so on).
        download: whether to fetch code and weights into torch's cache if they are not there.

    Raises:
        DiffxError: if there is no such network, or code or weights are absent or damaged.
    """

    def __init__(self, network: str = _DEFAULT, download: bool = False) -> None:
        super().__init__()
        # late: it imports torchvision, which most extractors do not need
        from torch_fidelity import feature_extractor_dinov2 as fidelity

        known = {name.removeprefix("dinov2-"): name for name in fidelity.MODEL_METADATA}
        if network not in known:
            raise DiffxError(
                f"there is no DINOv2 network '{network}'{nearest(network, list(known))}: choose extractor.network from "
                f"{', '.join(known)}"
            )
        entry = fidelity.MODEL_METADATA[known[network]]
        hub = Path(torch.hub.get_dir())
        code, weights = hub / "facebookresearch_dinov2_main", hub / "checkpoints" / f"{entry}_pretrain.pth"
        if not download and not ((code / "hubconf.py").is_file() and weights.is_file()):
            raise DiffxError(
                f"DINOv2 is missing: put the repository {_CODE} at '{code}' and {_WEIGHTS}/{entry}/{weights.name} at "
                f"'{weights}', or let diffx fetch both with extractor.download=true"
            )
        try:
            if weights.is_file():
                # torch.hub unpickles whatever the file holds: let it see only files without code
                torch.load(weights, map_location="cpu", weights_only=True)
            self.network: nn.Module = fidelity.FeatureExtractorDinoV2(known[network], ["dinov2"])
            self._weights_hash = sha256_of(weights)
        except Exception as error:  # the authors' code may raise anything
            raise DiffxError(
                f"DINOv2 cannot be loaded ({error}): delete '{code}' and '{weights}' and fetch them again with "
                "extractor.download=true"
            ) from error
        self.name = "dinov2" if network == _DEFAULT else known[network].replace("-", "_")
        self.dim = self.network.model.embed_dim  # type: ignore[union-attr]
        self.num_classes = 0
        resize = "torch-fidelity's TensorFlow 1 bilinear resize to 224x224 (dgm-eval: bicubic)"
        self.preprocessing = f"grey to RGB, {resize}, ImageNet's scale"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, D]` and no logits, `[B, 0]`, of uint8 images `[B, 1 or 3, H, W]`."""
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features, torch.empty(len(images), 0, device=features.device)

    @property
    def weights_hash(self) -> str:
        """The sha256 of the file of weights."""
        return self._weights_hash

    @property
    def origin(self) -> str:
        """The authors."""
        return f"facebookresearch/dinov2 through torch.hub, {self.name}"

    def check(self, channels: int, image_size: int) -> None:
        """Takes grey and RGB images of any size.

        Raises:
            DiffxError: for images with another number of channels.
        """
        check_grey_or_rgb(self.name, channels)
