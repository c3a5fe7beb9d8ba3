"""`diffx drill`: kills a run again and again, and says whether it came to the same as one that was left alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffx.cli.compose import Arguments, as_dict, parse, refuse_sweep
from diffx.cli.train import config_of
from diffx.experiment import Run, locate
from diffx.experiment.same import differences
from diffx.utils import DiffxError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL)
MOMENTS = ("start-up", "training", "checkpoint", "evaluation")


@dataclass(frozen=True)
class Kill:
    """What was done to the run.

    Arguments:
        signal: which signal.
        moment: when it was sent.
        step: the newest checkpoint afterwards.
        code: how the process ended.
    """

    signal: signal.Signals
    moment: str
    step: int
    code: int


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    own = as_dict([o for o in arguments.overrides if o.partition("=")[0] in ("kills", "draw", "out")])
    overrides = [o for o in arguments.overrides if o.partition("=")[0] not in own]
    for key in ("kills", "draw"):
        if key in own and not own[key].isdigit():
            raise DiffxError(f"{key} must be a whole number, not '{own[key]}'; set {key}=20")
    if any(o.startswith("runs_dir=") for o in overrides):
        raise DiffxError("diffx drill trains in a folder of its own; give out=FOLDER instead of runs_dir")
    console = Console()
    with contextlib.ExitStack() as stack:
        folder = own.get("out") or stack.enter_context(tempfile.TemporaryDirectory(prefix="diffx-drill-"))
        return drill(Path(folder), overrides, arguments, int(own.get("kills", 20)), int(own.get("draw", 0)), console)


def drill(folder: Path, overrides: list[str], arguments: Arguments, kills: int, draw: int, console: Console) -> int:
    """Trains an arm undisturbed and another copy of it under fire; 0 if they came to the same, otherwise 1.

    Arguments:
        folder: where both train.
        overrides: of the arm.
        arguments: with the folders of the user's configs.
        kills: how often to kill.
        draw: seed of the moments.
        console: where to print.
    """
    undisturbed = _Arm(folder / "undisturbed", overrides, arguments)
    console.print(f"undisturbed: {undisturbed.run.path}", highlight=False, soft_wrap=True)
    process, startup = undisturbed.start(), 0.0
    while process.poll() is None:
        if not startup and undisturbed.run.latest():
            startup = undisturbed.age
        time.sleep(0.05)
    if process.returncode:
        raise DiffxError(f"the arm does not train even undisturbed; try diffx train {' '.join(overrides)}")
    rng, done, lives = random.Random(draw), [], []
    plan = [(number, moment) for moment in MOMENTS for number in SIGNALS]
    while len(done) < kills or not lives or lives[-1].run.state != "finished":
        if not lives or lives[-1].run.state == "finished":
            lives.append(_Arm(folder / f"killed{len(lives)}", overrides, arguments))
        arm = lives[-1]
        if len(done) % len(plan) == 0:
            rng.shuffle(plan)
        number, moment = plan[len(done) % len(plan)]
        # so that there is something left to kill
        until = arm.steps * ((len(done) % 20) + 1) // 22
        ready = arm.waits_for(moment, rng, startup, until)
        process = arm.start()
        if len(done) < kills and not _wait_for(process, ready):
            process.send_signal(number)
            code = process.wait()
            done.append(Kill(number, moment, arm.newest_step(), code))
            console.print(f"  {len(done)}/{kills}  {number.name} in {moment}: {_said(done[-1])}", highlight=False)
        elif process.wait() not in (0, *(128 + n for n in SIGNALS)):
            raise DiffxError(f"the arm ended by itself with exit code {process.returncode}; see '{arm.log}'")
    found = [f"{arm.run.path}: {name}" for arm in lives for name in differences(arm.run, undisturbed.run)]
    console.print(_table(done))
    if found:
        shown = "\n".join(found[:10])
        console.print(
            f"[red]not the same[/] after {len(done)} kills; {len(found)} differences:\n{shown}", highlight=False
        )
        return 1
    console.print(
        f"[green]the same, bit for bit[/], after {len(done)} kills of {len(lives)} runs: weights, EMA, optimizer, "
        "metrics, evaluations",
        highlight=False,
    )
    return 0


class _Arm:
    """An arm in a folder of its own, started as a user would.

    Arguments:
        folder: its runs_dir.
        overrides: what is typed.
        arguments: with the folders of the user's configs.
    """

    def __init__(self, folder: Path, overrides: list[str], arguments: Arguments) -> None:
        words = [*overrides, f"runs_dir={folder}"]
        config = config_of(words, arguments)
        self.run: Run = locate(config["runs_dir"], config, words)
        self.steps: int = config["training"]["max_steps"]
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        dirs = [word for path in arguments.config_dirs for word in ("--config-dir", path)]
        self._command = [sys.executable, "-m", "diffx.cli.main", "train", *dirs, *words, "progress_bar=false"]
        self._started = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it, or goes on with it."""
        self._started = time.monotonic()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    @property
    def age(self) -> float:
        """Seconds since it was last started."""
        return time.monotonic() - self._started

    def newest_step(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(f.stem.partition("=")[2]) for f in self.run.checkpoints.glob("step=*.ckpt")), default=0)

    def waits_for(self, moment: str, rng: random.Random, startup: float, until: int) -> Callable[[], bool]:
        """What to wait for, from now on.

        Arguments:
            moment: one of `MOMENTS`.
            rng: draws within it.
            startup: seconds that a start takes.
            until: the step by which it is time in any case.
        """
        pause = rng.uniform(0, 0.05)
        if moment == "start-up":
            late = rng.uniform(0, startup)
            return lambda: self.age > late
        first = self.newest_step()
        target = rng.randint(first + 1, max(first + 1, until))
        before = set(self.run.samples.glob("step=*.png"))

        def ready() -> bool:
            if moment == "checkpoint":
                found = any(self.run.checkpoints.glob(".step=*.tmp.ckpt"))
            elif moment == "evaluation":
                found = bool(set(self.run.samples.glob("step=*.png")) - before) or self.run.state == "evaluating"
            else:
                found = self.run.latest().get("step", 0) >= target
            if found:
                time.sleep(pause)
            return found

        return ready


def _wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    """Waits until something is so; True if the process has ended before."""
    while not ready():
        if process.poll() is not None:
            return True
        time.sleep(0.002)
    return process.poll() is not None


def _said(kill: Kill) -> str:
    saved = kill.code == 128 + kill.signal
    return f"{'saved' if saved else 'dead'} at step {kill.step}"


def _table(done: list[Kill]) -> Table:
    shown = Table(title="kills", title_justify="left")
    shown.add_column("signal")
    for moment in MOMENTS:
        shown.add_column(moment, justify="right")
    for number in SIGNALS:
        cells = (sum(kill.signal == number and kill.moment == moment for kill in done) for moment in MOMENTS)
        shown.add_row(number.name, *(str(n or "") for n in cells))
    return shown
