"""What one waits for: help, a composed config, the first training step. Processes of their own, by the wall clock."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measure import Case, Clock

DIFFX = [sys.executable, "-m", "diffx.cli.main"]
ARM = [
    "trainer=cpu",
    "experiment=digits",
    "log_every_n_steps=1",
    "progress_bar=false",
    "evaluation.every_n_steps=0",
    "evaluation.num_samples=0",
]
PATIENCE = 300.0
"""Seconds after which the first step will not come."""


def cases(quick: bool, clock: Clock) -> list[Case]:
    """Importing PyTorch and Lightning stands beside them: less than that is not to be had for a training step."""
    where = dict(os.environ) if quick else with_byte_code()
    contenders: dict[str, Callable[[], float]] = {
        "python -c 'import torch'": partial(milliseconds_of, [sys.executable, "-c", "import torch"], where),
        "python -c 'import lightning'": partial(milliseconds_of, [sys.executable, "-c", "import lightning"], where),
        "diffx --help": partial(milliseconds_of, [*DIFFX, "--help"], where),
        "diffx train --help": partial(milliseconds_of, [*DIFFX, "train", "--help"], where),
        "diffx train --cfg": partial(milliseconds_of, [*DIFFX, "train", "--cfg", *ARM], where),
        "diffx train, first step logged": partial(first_step, where),
    }
    if quick:
        del contenders["python -c 'import lightning'"]
    else:
        for contender in contenders.values():  # the first run of each writes the byte code that the others read
            contender()
    return [Case("start-up, ms", "experiment=digits", contenders, 1 if quick else 5)]


def with_byte_code() -> dict[str, str]:
    """The environment, with a folder for byte code, so that it does not matter whether packages came with theirs."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    folder = tempfile.mkdtemp(prefix="diffx-start-up-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return environment | {"PYTHONPYCACHEPREFIX": folder}


def milliseconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Milliseconds from the start of a process to its end."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return (time.perf_counter() - started) * 1e3


def first_step(environment: dict[str, str]) -> float:
    """Milliseconds from the start of a training to the line that the log writes for its first step."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        started = time.perf_counter()
        command = [*DIFFX, "train", *ARM, f"runs_dir={folder}/runs"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while not any(_has_a_row(file) for file in Path(folder).glob("runs/*/*/*/metrics.csv")):
                if process.poll() is not None or time.perf_counter() > started + PATIENCE:
                    output.seek(0)
                    raise RuntimeError(f"the training ended without a step:\n{output.read()}")
                time.sleep(0.005)
            return (time.perf_counter() - started) * 1e3
        finally:
            process.kill()
            process.wait()


def _has_a_row(file: Path) -> bool:
    return file.read_bytes().count(b"\n") >= 2
