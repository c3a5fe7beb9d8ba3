"""Evaluation: a generator measured against a data set, on any number of processes, and the record of it."""

from diffx.evaluation.bits import bits_per_dim
from diffx.evaluation.evaluator import Evaluator, Interrupted, Measured, in_batches
from diffx.evaluation.record import RULER, Evaluation

__all__ = ["RULER", "Evaluation", "Evaluator", "Interrupted", "Measured", "bits_per_dim", "in_batches"]
