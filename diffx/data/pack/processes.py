"""The same work on many numbers, in this process or in several, that can be stopped and leaves nothing running."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch

from diffx.utils import DiffxError

T = TypeVar("T")
Tick = Callable[[], None]
"""What work calls after each piece of it; it may raise `Stop`."""


class Stop(BaseException):
    """Unwinds whatever is being done."""


def each(
    work: Callable[[int, Tick], T],
    numbers: Sequence[int],
    workers: int,
    report: Callable[[int], None] = lambda ticks: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, T]]:
    """The results of work on each number, as they come.

    Arguments:
        work: called with a number and with what to call after each piece of work.
        numbers: the numbers.
        workers: processes; 1 is this one.
        report: called now and then with the number of pieces done.
        stop: asked now and then whether to stop.

    Yields:
        Numbers and results.

    Raises:
        Stop: if stopped.
        DiffxError: what the work raises, or if a process dies.
    """
    if workers == 1 or len(numbers) < 2:
        yield from _alone(work, numbers, report, stop)
    else:
        yield from _together(work, numbers, min(workers, len(numbers)), report, stop)


def _alone(
    work: Callable[[int, Tick], T], numbers: Sequence[int], report: Callable[[int], None], stop: Callable[[], bool]
) -> Iterator[tuple[int, T]]:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        report(ticks)
        if stop():
            raise Stop

    for i in numbers:
        yield i, work(i, tick)


def _together(
    work: Callable[[int, Tick], T],
    numbers: Sequence[int],
    workers: int,
    report: Callable[[int], None],
    stop: Callable[[], bool],
) -> Iterator[tuple[int, T]]:
    # what is forked need not be sent: a million names, an array of images
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    ticks, halt = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _begin, (work, ticks, halt)) as pool:
        waiting: dict[Future[T], int] = {pool.submit(_one, i): i for i in numbers}
        try:
            while waiting:
                finished, _ = wait(waiting, 0.1, FIRST_COMPLETED)
                report(ticks.value)
                for future in finished:
                    yield waiting.pop(future), future.result()
                if stop():
                    raise Stop
        except BrokenProcessPool as error:
            raise DiffxError(
                "a process has died, most often for want of memory; set workers to a smaller number"
            ) from error
        finally:
            halt.set()
            pool.shutdown(wait=True, cancel_futures=True)


_state: dict[str, Any] = {}


def _begin(work: Callable[..., Any], ticks: Any, halt: Any) -> None:
    """Sets a worker up: signals are the parent's business, and it ends with the parent, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    _state.update(work=work, ticks=ticks, halt=halt)


def _one(i: int) -> Any:
    def tick() -> None:
        with _state["ticks"].get_lock():
            _state["ticks"].value += 1
        if _state["halt"].is_set():
            raise Stop

    try:
        return _state["work"](i, tick)
    except Stop:  # nobody waits for it any more
        return None
