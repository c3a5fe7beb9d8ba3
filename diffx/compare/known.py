"""What is known of each metric: which way is better, and which entry of `configs/metrics` sets it."""

from typing import Any

from diffx.evaluation import RULER

_LOWER, _HIGHER, _NEITHER = -1, 1, 0

_KNOWN: dict[str, tuple[int, str]] = {
    "fid": (_LOWER, "fd"),
    "fd": (_LOWER, "fd"),
    "fid_infinity": (_LOWER, "fd_infinity"),
    "fd_infinity": (_LOWER, "fd_infinity"),
    "per_class_fid": (_LOWER, "per_class_fd"),
    "per_class_fd": (_LOWER, "per_class_fd"),
    "kid": (_LOWER, "kid"),
    "kd": (_LOWER, "kid"),
    "cmmd": (_LOWER, "cmmd"),
    "bpd": (_LOWER, "likelihood"),
    "is": (_HIGHER, "is"),
    "precision": (_HIGHER, "pr"),
    "recall": (_HIGHER, "pr"),
    "density": (_HIGHER, "dc"),
    "coverage": (_HIGHER, "dc"),
    "class_consistency": (_HIGHER, "consistency"),
    # near 0 the model copies, far off it fails: neither way is better
    "nn_distance": (_NEITHER, "nearest"),
    "nn_ratio": (_NEITHER, "nearest"),
}
"""By the first words of a metric's name, as `fd` of `fd_digits`."""

_BESIDE = ("_floor", "_noise", "_heldout")
"""Endings of what a metric is judged by; no property of an arm."""

_BOUND = ("likelihood", "likelihood_images")
"""What measures `bpd`, which looks at test images and not at samples."""


def direction(metric: str) -> int:
    """1 where higher is better, −1 where lower is, 0 where neither is or nothing is known of the metric."""
    return _NEITHER if metric.endswith(_BESIDE) else _entry(metric)[0]


def arrow(metric: str) -> str:
    """`↑` where higher is better, `↓` where lower is, else nothing."""
    return {_HIGHER: "↑", _LOWER: "↓"}.get(direction(metric), "")


def metric_of(names: list[str]) -> str:
    """The metric to compare by unless another one is asked for: a Fréchet distance if there is one."""
    told = [name for name in names if direction(name)]
    leading = [name for name in told if name.startswith(("fid", "fd_")) and "_class_" not in name]
    return next(iter([*leading, *told, *names]))


def ruler(protocol: dict[str, Any], metric: str) -> dict[str, Any]:
    """What a metric was measured with: values by different rulers are not compared.

    Arguments:
        protocol: that of an evaluation.
        metric: the name of the value.
    """
    entry = _entry(metric)[1]
    if entry == "likelihood":
        return {key: protocol.get(key) for key in _BOUND}
    settings = protocol.get("metrics") or {}
    return {key: protocol.get(key) for key in RULER} | {"metrics": settings.get(entry) if entry else settings}


def _entry(metric: str) -> tuple[int, str]:
    names = [name for name in _KNOWN if metric == name or metric.startswith(f"{name}_")]
    return _KNOWN[max(names, key=len)] if names else (_NEITHER, "")
