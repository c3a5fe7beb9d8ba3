"""The run directory: where a run lives, what it is, and what it has done."""

from diffx.experiment.identity import fingerprint, identity, is_identity
from diffx.experiment.record import Record
from diffx.experiment.run import Run, locate

__all__ = ["Record", "Run", "fingerprint", "identity", "is_identity", "locate"]
