"""What an experiment *is*: the part of a config that decides the trained weights.

Devices, workers, paths and loggers are how it is run; sampler, guidance and metrics are questions asked of it later.
Neither belongs to the identity, so that the same command finds its own run on another machine, and a sweep over
samplers trains one model.
"""

import hashlib
import json
from typing import Any

HOW = {
    "choices",
    "trainer",
    "launcher",
    "sweeper",
    "logger",
    "runs_dir",
    "checkpoint",
    "log_every_n_steps",
    "progress_bar",
}
"""Top-level keys that say how a run is executed."""

INFERENCE = {
    "sampler",
    "discretization",
    "guidance",
    "thresholding",
    "weights",
    "extractor",
    "metrics",
    "likelihood",
    "evaluation",
}
"""Top-level keys that say what is asked of the trained model."""

DATA_HOW = {"root", "num_workers", "download", "cache_bytes", "images"}
"""Keys of `data` that say where the data lie, how they are read, and what samples are compared with."""


AUTOENCODER_HOW = {"batch_size", "download"}
"""Keys of `autoencoder` that say how it is run."""


def is_identity(key: str) -> bool:
    """Whether an override of this dotted key changes what the experiment is (its seed aside).

    Arguments:
        key: such as `schedule.s` or `trainer.devices`.
    """
    head, _, rest = key.lstrip("+~").partition(".")
    if rest.partition(".")[0] in {"data": DATA_HOW, "autoencoder": AUTOENCODER_HOW}.get(head, ()):
        return False
    head = head.partition("@")[0]  # GROUP@PACKAGE
    return head not in HOW | INFERENCE | {"seed", "experiment", "hydra"} and not head.startswith("hydra/")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the trained weights, the seed aside."""
    kept = {key: value for key, value in config.items() if key not in HOW | INFERENCE | {"seed"}}
    for group, how in (("data", DATA_HOW), ("autoencoder", AUTOENCODER_HOW)):
        kept[group] = {key: value for key, value in kept.get(group, {}).items() if key not in how}
    return kept


def fingerprint(value: Any, length: int = 10) -> str:
    """A hash of a JSON-like value, `length` hexadecimal digits, blind to the order of keys; 1 and 1.0 are equal."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True, default=str).encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
