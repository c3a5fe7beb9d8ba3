"""Networks that turn images into the features and class probabilities that metrics stand on."""

from diffx.metrics.extractors.base import Extractor, extract
from diffx.metrics.extractors.classifier import Classifier
from diffx.metrics.extractors.clip import CLIP
from diffx.metrics.extractors.dinov2 import DINOv2
from diffx.metrics.extractors.inception import Inception
from diffx.metrics.extractors.none import NoExtractor

__all__ = ["CLIP", "Classifier", "DINOv2", "Extractor", "Inception", "NoExtractor", "extract"]
