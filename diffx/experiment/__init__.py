"""The run directory: where a run lives, what it is, and what it has done."""

from diffx.experiment.collection import Collection, Measurement, Member, read_runs
from diffx.experiment.identity import fingerprint, identity, is_identity
from diffx.experiment.record import Record
from diffx.experiment.run import Run, find_runs, locate

__all__ = [
    "Collection",
    "Measurement",
    "Member",
    "Record",
    "Run",
    "find_runs",
    "fingerprint",
    "identity",
    "is_identity",
    "locate",
    "read_runs",
]
