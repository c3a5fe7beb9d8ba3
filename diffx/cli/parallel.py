"""`hydra/launcher=joblib`: several arms at once on one machine, each with GPUs of its own.

Threads are shared out by joblib: as many in each process as there are cores for it, unless `OMP_NUM_THREADS` says
otherwise.
"""

import contextlib
import fcntl
import importlib.util
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from diffx.cli.launch import _die_with_parent
from diffx.utils import DiffxError
from diffx.utils.signals import SIGNALS

_claims: dict[str, TextIO] = {}
"""What this process has claimed: a process keeps its GPUs for all arms that it runs, since CUDA reads them once."""


@dataclass(frozen=True)
class Parallel:
    """Arms in parallel processes.

    Arguments:
        processes: how many at once.
        gpus: the names of the GPUs to share out, as in `CUDA_VISIBLE_DEVICES`; empty to share out none.
        each: GPUs for each process.
        folder: where processes claim their share, and are told to stop.
    """

    processes: int
    gpus: list[str]
    each: int
    folder: str

    @classmethod
    def of(cls, overrides: Sequence[str], configs: Sequence[dict[str, Any]], folder: str) -> "Parallel | None":
        """How a sweep runs in parallel; None where it does not.

        Without `hydra.launcher.n_jobs` there are as many processes as there are GPUs for them; where there is none, as
        many as cores; and never more than arms.

        Raises:
            DiffxError: if the launcher is not installed.
        """
        if "hydra/launcher=joblib" not in overrides:
            return None
        if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
            raise DiffxError("hydra/launcher=joblib needs a plugin of Hydra's: pip install 'diffx[joblib]'")
        from joblib import cpu_count

        trainers = [config["trainer"] for config in configs]
        each = max(trainer["devices"] for trainer in trainers)
        gpus = [] if all(trainer["accelerator"] == "cpu" for trainer in trainers) else visible_gpus()
        asked = [word.partition("=")[2] for word in overrides if word.startswith("hydra.launcher.n_jobs=")]
        n = int(asked[-1]) if asked and asked[-1].isdigit() else 0
        n = n or (len(gpus) if gpus else cpu_count()) // each
        return cls(max(1, min(n, len(configs))), gpus, each, folder)

    @property
    def overrides(self) -> list[str]:
        """What the launcher is told."""
        return [f"hydra.launcher.n_jobs={self.processes}"]

    @property
    def stopped(self) -> int | None:
        """The signal that has asked to stop, None if none has."""
        with contextlib.suppress(OSError, ValueError):
            return int(Path(self.folder, "stop").read_text(encoding="utf-8"))
        return None

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """In the process that waits: hands signals on, so that all arms save before it ends."""

        def forward(number: int, frame: Any) -> None:
            Path(self.folder, "stop").write_text(str(number), encoding="utf-8")
            # a terminal has sent INT to all of them already
            for file in Path(self.folder).glob("slot*") if number != signal.SIGINT else ():
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int(file.read_text(encoding="utf-8")), number)

        previous = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            yield
        except Exception:
            if self.stopped is None:  # a process told to stop before it had begun is missed by joblib
                raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def worker(self, label: str, task: Callable[[], int]) -> int:
        """Runs an arm in a process of joblib's; its lines begin with its label."""
        if self.folder not in _claims:
            self._claim()
        if (number := self.stopped) is not None:
            return 128 + number
        for number in SIGNALS:  # in training these save; before and after there is nothing to be saved
            signal.signal(number, signal.default_int_handler)
        try:
            with contextlib.redirect_stdout(Labelled(label)), contextlib.redirect_stderr(Labelled(label)):
                return task()
        except KeyboardInterrupt:
            return 128 + (self.stopped or signal.SIGINT)
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _claim(self) -> None:
        """Takes a share of the GPUs until this process ends; one that is killed leaves it."""
        _die_with_parent()
        for slot in range(10_000):
            file = Path(self.folder, f"slot{slot}").open("a+", encoding="utf-8")  # noqa: SIM115 (kept while it lives)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            _claims[self.folder] = file
            if self.gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share(slot, self.gpus, self.each))
            return


def share(slot: int, gpus: Sequence[str], each: int) -> Sequence[str]:
    """The GPUs of a process: `each` of them, the same again where there are more processes than that.

    Arguments:
        slot: the process's number.
        gpus: all GPUs.
        each: how many it needs.
    """
    first = slot % max(len(gpus) // each, 1) * each
    return gpus[first : first + each]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(k) for k in range(torch.cuda.device_count())]


class Labelled(io.TextIOBase):
    """Standard output in which every line begins with a label; whole lines only, so that those of processes never mix.

    Arguments:
        label: such as `[2/12]`.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._rest = ""

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Writes what has become whole lines."""
        *lines, self._rest = (self._rest + text).split("\n")
        os.write(1, "".join(f"{self.label} {line}\n" for line in lines).encode())
        return len(text)
