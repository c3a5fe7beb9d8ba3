"""Networks that turn images into the features and class probabilities that metrics stand on."""

from diffx.metrics.extractors.base import Extractor, extract
from diffx.metrics.extractors.classifier import Classifier
from diffx.metrics.extractors.inception import Inception
from diffx.metrics.extractors.none import NoExtractor

__all__ = ["Classifier", "Extractor", "Inception", "NoExtractor", "extract"]
