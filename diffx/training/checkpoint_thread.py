"""Work beside training, one piece at a time."""

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work at a time in a thread and keeps its error for who waits.

    Lightning's `AsyncCheckpointIO` does not do: its queue holds any number of copies of the state, copied on the
    device; it says nothing of the end of a write, after which older files may go; and an error comes up at the second
    save after it or as the trainer is torn down.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts it, after the work before has ended.

        Raises:
            Exception: what the work before has raised.
        """
        self.wait()
        # a daemon: who interrupts twice does not wait for it
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the work has raised an error that nobody has seen yet."""
        return self._error is not None

    def wait(self) -> None:
        """Waits for the end of the work.

        Raises:
            Exception: what it has raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
