"""Which way a metric is to go."""

from diffx.compare.known import direction


def aim(metric: str) -> str:
    """In words."""
    return {-1: "lower is better", 1: "higher is better", 0: "neither way is better by itself"}[direction(metric)]


def tone(metric: str, difference: float) -> str:
    """`better`, `worse`, or `different` where neither way is better."""
    return {1: "better", -1: "worse"}.get(direction(metric) * (1 if difference > 0 else -1), "different")
