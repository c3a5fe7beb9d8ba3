"""The contract of an experiment tracker: somewhere beside `metrics.csv` that is told of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffx.evaluation import Evaluation
from diffx.utils import DiffxError


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run before it starts.

    Arguments:
        directory: the run directory; a tracker writes into a folder of its own below it.
        run_id: the same after every requeue: the fingerprint of the experiment, and its seed.
        group: the experiment without the seed.
        name: the run's name.
        job: `train` or `evaluate`.
        tags: what was overridden, such as `schedule=cosine`.
        config: the frozen config.
        launch: commit, versions, command and host of this launch.
        facts: plain values to sort runs by, such as `seed` and `parameters`.
        step: the training step that the run goes on from, 0 if it starts.
    """

    directory: Path
    run_id: str
    group: str
    name: str
    job: str = "train"
    tags: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    launch: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


class Tracker(ABC):
    """Told of one run, by the first rank only.

    Its constructor is cheap, and raises where its library is missing; `start` comes before all else. What a method
    raises is told to the user and costs the tracker, never the run.
    """

    @abstractmethod
    def start(self) -> None:
        """Opens the run, or goes on in it."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes values of a training step."""

    @abstractmethod
    def log_picture(self, key: str, picture: Path, step: int) -> None:
        """Takes a PNG file."""

    @abstractmethod
    def log_evaluation(self, name: str, evaluation: Evaluation, step: int) -> None:
        """Takes a whole evaluation as a table; `name` says which, as `final`."""

    @abstractmethod
    def log_files(self, files: Sequence[Path], step: int) -> None:
        """Takes the weights, or the checkpoint, if it has been chosen to keep them."""

    @abstractmethod
    def finish(self, code: int) -> None:
        """Closes the run; `code` is its exit code: 0, or 128 + the signal that interrupted it, or an error's."""


COLUMNS = ("metric", "value", "stderr", "low", "high", "n", "protocol")
"""The columns of an evaluation's table; `low` to `high` is the 95 % interval for n → ∞."""


def rows_of(evaluation: Evaluation) -> list[list[Any]]:
    """An evaluation as rows of `COLUMNS`."""
    return [
        [value.name, value.value, value.stderr, *(value.interval or (None, None)), value.n, evaluation.fingerprint]
        for value in evaluation.values.values()
    ]


def needs(package: str, extra: str) -> None:
    """Refuses a tracker whose library is missing.

    Raises:
        DiffxError: naming the extra to install.
    """
    if find_spec(package) is None:
        raise DiffxError(f"logger={extra} needs the package {package}; install it: pip install 'diffx[{extra}]'")
