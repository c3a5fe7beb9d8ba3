"""SLURM: the batch script, submitting it, living through preemption inside it, and the ledger of what became of it."""

from diffx.launch.ledger import Ledger
from diffx.launch.slurm import Slurm, Srun
from diffx.launch.supervise import supervise

__all__ = ["Ledger", "Slurm", "Srun", "supervise"]
