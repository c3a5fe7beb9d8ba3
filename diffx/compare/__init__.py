"""Many runs as one comparison: arms, means over seeds with intervals, effects against a baseline, verdicts."""

from diffx.compare.budget import Budget
from diffx.compare.comparison import Comparison, Row, compare
from diffx.compare.effects import Estimate, between_samples, between_seeds, holm, mean_over_seeds
from diffx.compare.known import direction, metric_of
from diffx.compare.tables import FORMATS, render, to_csv, to_latex, to_markdown, to_rich

__all__ = [
    "FORMATS",
    "Budget",
    "Comparison",
    "Estimate",
    "Row",
    "between_samples",
    "between_seeds",
    "compare",
    "direction",
    "holm",
    "mean_over_seeds",
    "metric_of",
    "render",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_rich",
]
