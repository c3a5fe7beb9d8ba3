"""Being asked to stop."""

import signal
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and what cluster schedulers send before they kill."""


class StopSignal:
    """Takes over the signals that ask to stop: they only set a flag, which is read where stopping loses nothing.

    It can be entered again, and remembers.

    Attributes:
        number: the first signal received, None if none was: others are often sent on the heels of it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._restore: list[Callable[[], Any]] = []

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._restore.append(lambda number=number, previous=previous: signal.signal(number, previous))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._restore:
            self._restore.pop()()

    def __bool__(self) -> bool:
        return self.number is not None

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait
        self.number = self.number or number
