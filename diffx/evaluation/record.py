"""What is kept of an evaluation.

A number is stored with its protocol: whatever changes the value is named beside it, and numbers of different protocols
have different fingerprints.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffx.metrics import Value
from diffx.utils import DiffxError, write_text

RULER = (
    "extractor",
    "weights_hash",
    "preprocessing",
    "quantization",
    "reference",
    "metrics",
    "num_samples",
    "sample_seed",
)
"""What measures, of a protocol; the rest is what is measured. Values by different rulers are not compared."""


@dataclass(frozen=True)
class Evaluation:
    """The values of one evaluation with their protocol.

    Arguments:
        values: metrics by name.
        protocol: all that the values depend on, JSON-like.
        fingerprint: the hash of the protocol, without the checkpoint's step and the training seed.
        seconds: `sampling`, `extraction` (metrics included), `rest` and `total`, of the first process.
        omitted: metrics that could not be measured, with the reason.
        settings: the parts of the config that were asked for, from which the evaluation can be repeated.
        command: what to type to repeat it.
        environment: device, number of processes, versions, commit: what should not matter, but may.
    """

    values: dict[str, Value]
    protocol: dict[str, Any]
    fingerprint: str
    seconds: dict[str, float]
    omitted: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> float | None:
        """Denoiser calls per sample: those that the settings say, or those counted of an adaptive sampler."""
        counted = self.values.get("nfe")
        return self.protocol.get("nfe") or (counted and counted.value)

    def save(self, path: Path) -> None:
        """Writes one JSON file, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads what `save` wrote.

        Raises:
            DiffxError: if the file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            values = {name: _value(value) for name, value in content.pop("values").items()}
            found = cls(values=values, **content)
            if not all(isinstance(part, dict) for part in (found.protocol, found.settings, found.environment)):
                raise TypeError("its protocol, settings or environment is no table")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DiffxError(f"the evaluation '{path}' is damaged ({error}); delete it and evaluate again") from error


def _value(content: dict[str, Any]) -> Value:
    # JSON knows lists only
    plain: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in content.items()}
    if not isinstance(plain["value"], int | float):
        raise TypeError(f"the value of {plain['name']} is no number")
    return Value(**plain)
