"""The Inception network of the FID, as torch-fidelity has it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffx.metrics.extractors.base import Extractor, check_grey_or_rgb
from diffx.metrics.extractors.weights import find_weights, is_published, sha256_of
from diffx.utils import DiffxError

_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
_FILE = _URL.rpartition("/")[2]
_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_PAPER_NAMES = {
    "fd": "fid",
    "fd_infinity": "fid_infinity",
    "per_class_fd": "per_class_fid",
    "kd": "kid",
    **{name: name for name in ("is", "precision", "recall", "density", "coverage")},
}


class Inception(Extractor):
    """torch-fidelity's InceptionV3: 2048 features, and the logits without bias that its Inception Score reads.

    Its resize, which imitates that of TensorFlow 1, is part of it and stays: a resize with antialiasing changes FID by
    percents. Grey images are repeated to RGB. Source: Szegedy et al., *Rethinking the Inception Architecture for
    Computer Vision*, arXiv 1512.00567, with the weights of Heusel et al., arXiv 1706.08500. Use it when results are to
    be compared with published FIDs.

    Arguments:
        weights: the path of the weights; by default torch-fidelity's own place in torch's cache.
        download: whether to download them to that place if they are not there.
        check_hash: whether to refuse weights other than the published ones; if these are taken, metrics on them are
            not called `fid` and `is` but `fd_inception_other` and so on.

    Raises:
        DiffxError: if the weights are absent, damaged, of another network, or not the published ones.
    """

    def __init__(self, weights: str | Path | None = None, download: bool = False, check_hash: bool = True) -> None:
        super().__init__()
        self.dim = 2048
        self.num_classes = 1008
        self.preprocessing = "grey to RGB, torch-fidelity's TensorFlow 1 bilinear resize to 299x299, (x - 128) / 128"
        path = find_weights("Inception", _URL, _FILE, _SHA256, weights, download)
        self._weights_hash = sha256_of(path)
        self._published = is_published("Inception", path, self._weights_hash, _SHA256, check_hash)
        self.name = "inception" if self._published else "inception_other"
        self.paper_names = _PAPER_NAMES if self._published else {}
        # half as fast again on a CPU; the same numbers up to rounding
        self.network = _fused(_load(path)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, 2048]` and logits `[B, 1008]` of uint8 images `[B, 1 or 3, H, W]`."""
        return self.network(images.expand(-1, 3, -1, -1))

    @property
    def weights_hash(self) -> str:
        """The sha256 of the file."""
        return self._weights_hash

    @property
    def origin(self) -> str:
        """Whether these are the weights that published FIDs stand on."""
        if self._published:
            return "published weights inception-2015-12-05"
        return "non-standard weights: not comparable with published FIDs"

    def check(self, channels: int, image_size: int) -> None:
        """Takes grey and RGB images of any size.

        Raises:
            DiffxError: for images with another number of channels.
        """
        check_grey_or_rgb(self.name, channels)


def _load(path: Path) -> nn.Module:
    # late: it imports torchvision, which no other extractor needs
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    advice = f"get {_FILE} from torch-fidelity's release page"
    try:
        # torch-fidelity unpickles whatever the file holds: let it see only files without code
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DiffxError(f"'{path}' is damaged or more than a file of weights: {advice}") from error
    try:
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DiffxError(f"'{path}' holds the weights of another network: {advice}") from error


def _fused(network: nn.Module) -> nn.Module:
    """The network with each batch norm folded, in float64, into the convolution before it."""
    for block in network.modules():
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            dtype = conv.weight.dtype
            block.conv = fuse_conv_bn_eval(conv.eval().double(), norm.eval().double()).to(dtype)
            block.bn = nn.Identity()
    return network
