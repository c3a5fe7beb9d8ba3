"""Evaluation: a generator measured against a data set, on any number of processes, and the record of it."""

from diffx.evaluation.bits import bits_per_dim
from diffx.evaluation.evaluator import Evaluator, Interrupted, Measured, in_batches
from diffx.evaluation.record import Evaluation

__all__ = ["Evaluation", "Evaluator", "Interrupted", "Measured", "bits_per_dim", "in_batches"]
