"""What each arm was given to train with, and which of it was equal."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

TOLERANCE = {"steps": 0.0, "images": 0.0, "FLOPs": 0.01, "device-seconds": 0.05}
"""What may be spent on training, and up to which relative difference it counts as equal."""


@dataclass(frozen=True)
class Budget:
    """What the arms were trained with, as far as it is known.

    Arguments:
        spent: for each of `TOLERANCE` that is known of all arms, the mean over seeds of each arm, in the arms' order.
        device: `GPU` or `device`: what the seconds are of.
    """

    spent: Mapping[str, list[float]]
    device: str = "device"

    @property
    def equal(self) -> list[str]:
        """What was equal."""
        return [name for name, amounts in self.spent.items() if _is_equal(name, amounts)]

    @property
    def unequal(self) -> list[str]:
        """What was not."""
        return [name for name in self.spent if name not in self.equal]

    @property
    def unknown(self) -> list[str]:
        """What is not known of every arm."""
        return [name for name in TOLERANCE if name not in self.spent]

    def __str__(self) -> str:
        """One sentence."""
        if not self.spent:
            return "training budget: unknown"
        if len(next(iter(self.spent.values()))) < 2:
            told = ", ".join(f"{_number(amounts[0])} {self._name(name)}" for name, amounts in self.spent.items())
            return f"training budget of the one arm: {told}"
        equal = ", ".join(f"{_number(self.spent[name][0])} {self._name(name)}{_within(name)}" for name in self.equal)
        unequal = ", ".join(f"{self._name(name)} ({self._range(name)})" for name in self.unequal)
        parts = [f"equal in {equal}" if equal else "equal in nothing", f"unequal in {unequal}" if unequal else ""]
        if self.unknown:
            parts.append(f"{' and '.join(map(self._name, self.unknown))} not logged")
        return "training budget: " + "; ".join(part for part in parts if part)

    def _name(self, name: str) -> str:
        return name.replace("device", self.device)

    def _range(self, name: str) -> str:
        low, high = min(self.spent[name]), max(self.spent[name])
        return f"{_number(low)} … {_number(high)}"


def _is_equal(name: str, amounts: list[float]) -> bool:
    return max(amounts) <= min(amounts) * (1 + TOLERANCE[name])


def _within(name: str) -> str:
    return f" (within {TOLERANCE[name]:.0%})" if TOLERANCE[name] else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e7 and math.isfinite(value) else f"{value:.3g}"
