"""Numbers for sets of uint8 images, each with its uncertainty and its method. Knows nothing of models."""

from diffx.metrics.base import ImageMetric, Inapplicable, Observation
from diffx.metrics.clip_mmd import ClipMMD
from diffx.metrics.consistency import ClassConsistency
from diffx.metrics.effect import Effect, paired
from diffx.metrics.extractors import CLIP, Classifier, DINOv2, Extractor, Inception, NoExtractor, extract
from diffx.metrics.fit import accuracy, fit_classifier
from diffx.metrics.frechet import FrechetDistance, FrechetInfinity, frechet_distance
from diffx.metrics.image_metrics import ImageMetrics
from diffx.metrics.inception_score import InceptionScore
from diffx.metrics.kernel_distance import KernelDistance
from diffx.metrics.manifolds import DensityCoverage, PrecisionRecall
from diffx.metrics.nearest import NearestDistance
from diffx.metrics.per_class import PerClassFrechet
from diffx.metrics.reference import ImageSet, Reference
from diffx.metrics.statistics import Statistics
from diffx.metrics.values import BLOCKS, Value

__all__ = [
    "BLOCKS",
    "CLIP",
    "ClassConsistency",
    "Classifier",
    "ClipMMD",
    "DINOv2",
    "DensityCoverage",
    "Effect",
    "Extractor",
    "FrechetDistance",
    "FrechetInfinity",
    "ImageMetric",
    "ImageMetrics",
    "ImageSet",
    "Inapplicable",
    "Inception",
    "InceptionScore",
    "KernelDistance",
    "NearestDistance",
    "NoExtractor",
    "Observation",
    "PerClassFrechet",
    "PrecisionRecall",
    "Reference",
    "Statistics",
    "Value",
    "accuracy",
    "extract",
    "fit_classifier",
    "frechet_distance",
    "paired",
]
