"""Lightning's logger around a tracker, such that no tracker can stop a run."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffx.evaluation import Evaluation
from diffx.training.loggers.tracker import Tracker


class Tracked(Logger):
    """Passes on to a tracker on the first rank, and goes on without it from its first failure.

    Arguments:
        key: the tracker's name, as in `logger=`.
        tracker: the tracker.
    """

    def __init__(self, key: str, tracker: Tracker) -> None:
        super().__init__()
        self.key = key
        self.tracker = tracker
        self._started = self._lost = False

    @property
    def name(self) -> str:
        """The tracker's name."""
        return self.key

    @property
    def version(self) -> str:
        """Empty: the run directory is the version."""
        return ""

    @property
    def experiment(self) -> Tracker:
        """The tracker, started; Lightning asks for it before training, so that no step waits for it."""
        self._tell(lambda tracker: None)
        return self.tracker

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tracker has the frozen config."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Values of a training step."""
        self._tell(lambda tracker: tracker.log_metrics(metrics, step or 0))

    def log_picture(self, key: str, picture: Path, step: int) -> None:
        """A PNG file."""
        self._tell(lambda tracker: tracker.log_picture(key, picture, step))

    def log_evaluation(self, name: str, evaluation: Evaluation, step: int) -> None:
        """A whole evaluation as a table."""
        self._tell(lambda tracker: tracker.log_evaluation(name, evaluation, step))

    def log_files(self, files: Sequence[Path], step: int) -> None:
        """Weights, for the trackers that keep them."""
        self._tell(lambda tracker: tracker.log_files(files, step))

    def finish(self, code: int) -> None:
        """Closes a run that has been opened."""
        if self._lost:
            with suppress(Exception):  # it has been told already
                self.tracker.finish(code)
        elif self._started:
            self._tell(lambda tracker: tracker.finish(code))
        self._started = False

    @rank_zero_only
    def _tell(self, what: Callable[[Tracker], None]) -> None:
        if self._lost:
            return
        try:
            if not self._started:
                self._started = True
                self.tracker.start()
            what(self.tracker)
        except Exception as error:  # libraries and services raise whatever they like
            self._lost = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(
                f"{self.key} has failed and is left out from here on ({reason}); metrics.csv has everything",
                file=sys.stderr,
                flush=True,
            )


def trackers(loggers: Iterable[Logger]) -> list[Tracked]:
    """Those loggers that take more than numbers."""
    return [logger for logger in loggers if isinstance(logger, Tracked)]


def log_image(loggers: Iterable[Logger], key: str, path: Path, step: int) -> None:
    """Gives a picture to the loggers that take pictures."""
    for logger in trackers(loggers):
        logger.log_picture(key, path, step)
