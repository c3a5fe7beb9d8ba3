"""CLIP's image encoder, as torch-fidelity has it."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from diffx.metrics.extractors.base import Extractor, check_grey_or_rgb
from diffx.metrics.extractors.weights import find_weights, is_published, sha256_of
from diffx.utils import DiffxError, nearest

_DEFAULT = "vit-b-32"
_PAPER = "vit-l-14-336px"


class CLIP(Extractor):
    """The image encoder of CLIP: features that know scenes, from a network that never saw ImageNet's classes.

    The preprocessing is torch-fidelity's: a bilinear resize that imitates TensorFlow 1 instead of CLIP's own bicubic
    one. Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, arXiv
    2103.00020; as a feature space for Fréchet distances Kynkäänniemi et al., *The Role of ImageNet Classes in Fréchet
    Inception Distance*, arXiv 2203.06026. Use it when images are natural scenes and the classes of ImageNet should not
    decide, and for CMMD, whose paper takes `vit-l-14-336px`.

    Arguments:
        network: `vit-b-32` (metrics are called `fd_clip`), `vit-b-16`, `vit-l-14` or `vit-l-14-336px` (`fd_clip_…`).
        weights: the path of OpenAI's file; by default torch-fidelity's own place in torch's cache.
        download: whether to download it to that place if it is not there.
        check_hash: whether to refuse weights other than the published ones; if these are taken, the metrics say so.

    Raises:
        DiffxError: if there is no such network, or the weights are absent, damaged, or not the published ones.
    """

    def __init__(
        self,
        network: str = _DEFAULT,
        weights: str | Path | None = None,
        download: bool = False,
        check_hash: bool = True,
    ) -> None:
        super().__init__()
        # late: it imports torchvision, which most extractors do not need
        from torch_fidelity import feature_extractor_clip as fidelity

        known = {name.removeprefix("clip-"): name for name in fidelity.MODEL_URLS if name.startswith("clip-vit")}
        if network not in known:
            raise DiffxError(
                f"there is no CLIP network '{network}'{nearest(network, list(known))}: choose extractor.network from "
                f"{', '.join(known)}"
            )
        full_name = known[network]
        url, sha256 = fidelity.MODEL_URLS[full_name], fidelity.MODEL_METADATA[full_name]["hash"]
        path = find_weights("CLIP", url, f"{full_name}-{sha256}.pt", sha256, weights, download)
        self._weights_hash = sha256_of(path)
        self._published = is_published("CLIP", path, self._weights_hash, sha256, check_hash)
        name = "clip" if network == _DEFAULT else full_name.replace("-", "_")
        self.name = name if self._published else f"{name}_other"
        self.paper_names = {"cmmd": "cmmd"} if self._published and network == _PAPER else {}
        self._full_name = full_name
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated, and OpenAI's files are of no other kind
                warnings.simplefilter("ignore", FutureWarning)
                self.network: nn.Module = fidelity.FeatureExtractorCLIP(full_name, ["clip"], str(path))
            self.dim = self.network.model.visual.proj.shape[1]  # type: ignore[union-attr, index]
        except (RuntimeError, KeyError, AttributeError) as error:
            raise DiffxError(f"'{path}' is damaged or no CLIP network: get {url}") from error
        self.num_classes = 0
        size = self.network.resolution
        self.preprocessing = (
            f"grey to RGB, torch-fidelity's TensorFlow 1 bilinear resize to {size}x{size}, CLIP's scale"
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, D]` and no logits, `[B, 0]`, of uint8 images `[B, 1 or 3, H, W]`."""
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features, torch.empty(len(images), 0, device=features.device)

    @property
    def weights_hash(self) -> str:
        """The sha256 of the file."""
        return self._weights_hash

    @property
    def origin(self) -> str:
        """Whether these are OpenAI's weights."""
        return f"OpenAI's {self._full_name}" if self._published else f"other weights than OpenAI's {self._full_name}"

    def check(self, channels: int, image_size: int) -> None:
        """Takes grey and RGB images of any size.

        Raises:
            DiffxError: for images with another number of channels.
        """
        check_grey_or_rgb(self.name, channels)
