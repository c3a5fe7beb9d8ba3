"""What a number's reader needs to know about the machine and the code that made it."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from diffx.utils import write_text

PACKAGES = ("torch", "lightning", "torchmetrics", "torch-fidelity", "hydra-core", "numpy", "diffx")


@dataclass(frozen=True)
class Record:
    """One launch of a run.

    Arguments:
        command: the command line.
        time: when it was launched, UTC, ISO 8601.
        commit: the git commit of the working directory; empty outside a repository.
        dirty: whether that had uncommitted changes (kept in `diff.patch`).
        packages: versions of the packages that matter.
        python: the version of Python.
        host: the name of the machine.
        device: its GPUs, as `cuda (4 × NVIDIA H100 80GB HBM3)`, or its processor, as `cpu (AMD EPYC, 2 cores)`.
    """

    command: str
    time: str
    commit: str
    dirty: bool
    packages: dict[str, str]
    python: str
    host: str
    device: str

    @classmethod
    def now(cls, command: list[str]) -> "Record":
        """The record of this process."""
        return cls(
            command=" ".join(command),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=_git("rev-parse", "HEAD").strip(),
            dirty=bool(_git("status", "--porcelain", "--untracked-files=no").strip()),
            packages={name: _version(name) for name in PACKAGES},
            python=platform.python_version(),
            host=platform.node(),
            device=_device(),
        )

    def append_to(self, directory: Path) -> None:
        """Adds the launch to `launches.jsonl` and writes the uncommitted changes to `diff.patch`.

        The log is written anew and renamed: a killed process never leaves half a line.
        """
        file = directory / "launches.jsonl"
        before = file.read_text(encoding="utf-8") if file.is_file() else ""
        write_text(file, before + json.dumps(asdict(self)) + "\n")
        if self.dirty:
            write_text(directory / "diff.patch", _git("diff", "HEAD"))


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=20, check=True, errors="replace"
        )
        return result.stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _device() -> str:
    torch = sys.modules.get("torch")  # it takes seconds to import, and whoever computes has
    if torch is not None and torch.cuda.is_available():
        return f"cuda ({torch.cuda.device_count()} × {torch.cuda.get_device_name()})"
    return f"cpu ({processor()}, {os.cpu_count()} cores)"


def processor() -> str:
    """The name of the processor, as `AMD EPYC`, or its kind, as `x86_64`."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def command_line() -> list[str]:
    """What the user typed, with the program's name instead of its path."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119
    return ["diffx" if name == "main.py" else name, *sys.argv[1:]]  # python -m diffx.cli.main
