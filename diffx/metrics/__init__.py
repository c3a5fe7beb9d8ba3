"""Numbers for sets of uint8 images, each with its uncertainty and its method. Knows nothing of models."""

from diffx.metrics.base import ImageMetric, Observation
from diffx.metrics.consistency import ClassConsistency
from diffx.metrics.extractors import Classifier, Extractor, Inception, NoExtractor, extract
from diffx.metrics.fit import accuracy, fit_classifier
from diffx.metrics.frechet import FrechetDistance, frechet_distance
from diffx.metrics.image_metrics import ImageMetrics, standard_metrics
from diffx.metrics.inception_score import InceptionScore
from diffx.metrics.nearest import NearestDistance, nearest_distance
from diffx.metrics.statistics import Statistics, cached_statistics, reference_statistics, statistics_path
from diffx.metrics.values import BLOCKS, Value

__all__ = [
    "BLOCKS",
    "ClassConsistency",
    "Classifier",
    "Extractor",
    "FrechetDistance",
    "ImageMetric",
    "ImageMetrics",
    "Inception",
    "InceptionScore",
    "NearestDistance",
    "NoExtractor",
    "Observation",
    "Statistics",
    "Value",
    "accuracy",
    "cached_statistics",
    "extract",
    "fit_classifier",
    "frechet_distance",
    "nearest_distance",
    "reference_statistics",
    "standard_metrics",
    "statistics_path",
]
