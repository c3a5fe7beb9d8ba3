"""Several processes on one node."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any


def launch(arguments: list[str], count: int) -> int:
    """One process per device on this node; returns the exit code.

    Signals go on to the ranks, which save together. A rank that fails takes the others with it: they would wait for it
    for ever.

    Arguments:
        arguments: of Python, in every process.
        count: the number of processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # how Lightning knows processes that others have started; one thread each unless the user says otherwise
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, *arguments]
    ranks = [
        subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(k)}, preexec_fn=_die_with_parent)
        for k in range(count)
    ]

    def forward(number: int, frame: Any) -> None:
        # a terminal has sent INT to the ranks already
        for rank in ranks if number != signal.SIGINT else []:
            rank.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    previous = [signal.signal(number, forward) for number in numbers]
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
        # 128 and more: stopped by a signal, and saving together
        if any(0 < (rank.poll() or 0) < 128 or (rank.poll() or 0) < 0 for rank in ranks):
            _end(ranks)
    for number, handler in zip(numbers, previous, strict=True):
        signal.signal(number, handler)
    codes = [rank.returncode for rank in ranks]
    return max((code if code >= 0 else 128 - code) for code in codes)


def _die_with_parent() -> None:
    """A rank whose parent is killed must not go on: the run's lock is the parent's, and another start would meet it."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end(ranks: list[subprocess.Popen[bytes]], grace: float = 10.0) -> None:
    """Gives the ranks time to end by themselves, then kills them."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.wait()
