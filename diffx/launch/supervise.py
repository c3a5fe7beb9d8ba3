"""Inside a job: the ranks by srun, and what to do when they end."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffx.experiment import Run
from diffx.launch.ledger import Ledger, job_id
from diffx.launch.scheduler import requeue
from diffx.utils import DiffxError
from diffx.utils.signals import SIGNALS


def supervise(run: Run, command: Sequence[str], tasks: int, srun: Sequence[str] = (), retries: int = 2) -> int:
    """Starts a process per device by srun, waits, and requeues the job where that brings the run further.

    Stopped by a signal, a run has saved: it is requeued, unless the user has cancelled the job. Killed or crashed, it
    is requeued as long as its checkpoints advance, and `retries` times without. Failed for its own reasons (exit code
    2: bad data, a loss that is not finite, a full disk), it is not requeued.

    Arguments:
        run: the run directory, locked by the caller; it holds the frozen config.
        command: what each process executes.
        tasks: the number of processes over all nodes.
        srun: further options of srun.
        retries: starts without progress.

    Returns:
        The exit code: 0 done, 2 failed, 128 + n stopped by signal n.

    Raises:
        DiffxError: if this is no job.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise DiffxError(
            "launcher=srun works inside a SLURM job only; submit with launcher=slurm, or use sbatch or salloc"
        )
    ledger = Ledger(run.path)
    with _deaf():
        before = step_of(run)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        ledger.add("started", step=before, restarts=restarts, log=_log())
        run.set_status("running", step=before)  # what an earlier start has said is not to be taken for this one's word
        options = [f"--ntasks={tasks}", "--kill-on-bad-exit=1", *srun]
        if "SLURM_CPUS_PER_TASK" in os.environ:  # srun does not take it over from sbatch
            options.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
        code = subprocess.call(["srun", *options, *command])
        return _after(run, ledger, code, before, retries)


def _after(run: Run, ledger: Ledger, code: int, before: int, retries: int) -> int:
    status, step = run.status(), step_of(run)
    state = status.get("state")
    if code == 0 and state == "finished":
        ledger.add("finished", step=step)
        return 0
    if code == 2:
        ledger.add("failed", step=step, reason=status.get("reason") or "see the log")
        return 2
    if state == "interrupted" or code - 128 in SIGNALS:
        # srun ends the ranks that are left when the first has gone, and answers with what they died of
        number = status["signal"] if state == "interrupted" else code - 128
        ledger.add("stopped", step=step, signal=signal.Signals(number).name)
        _requeue("was stopped and has saved")
        return 128 + number
    reason = _died(code)
    ledger.add("died", step=step, reason=reason)
    futile = _futile(ledger, step)
    if futile > retries:
        reason = f"{reason}; {futile} starts did not get beyond step {step}"
        run.set_status("failed", step=step, reason=reason)
        ledger.add("failed", step=step, reason=reason)
        return 2
    _requeue(reason)
    return 1


def _futile(ledger: Ledger, step: int) -> int:
    """How many starts in a row have died at this step."""
    count = 0
    for row in reversed(ledger.events()):
        if row["event"] in ("submitted", "stopped") or (row["event"] == "died" and row["step"] < step):
            break
        count += row["event"] == "died"
    return count


def step_of(run: Run) -> int:
    """The step of the newest checkpoint, whole or not; 0 without one."""
    return max((int(file.stem.partition("=")[2]) for file in run.checkpoints.glob("step=*.ckpt")), default=0)


def _requeue(why: str) -> None:
    # said before: SLURM kills what runs of a job that it requeues, this process too
    print(f"job {job_id()} {why}; it asks to be requeued", flush=True)
    # by its number in the array: SLURM_JOB_ID of one of the elements means all of them
    if not requeue(job_id()):
        print(f"job {job_id()} is not requeued; the same command, or diffx jobs --resubmit, resumes", flush=True)


def _log() -> str:
    """The file that the output goes to, if it goes to one."""
    with contextlib.suppress(OSError):
        target = Path("/proc/self/fd/1").resolve()
        return str(target) if target.is_file() else ""
    return ""


def _died(code: int) -> str:
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed (SIGKILL: out of memory, a lost node, or the end of the grace time)"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        names = {n.value: n.name for n in signal.Signals}
        return f"killed by {names.get(number, f'signal {number}')}"
    return f"ended with exit code {code}; see the log"


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Signals are the ranks' business: srun and SLURM hand them on, and this process must live to requeue."""
    previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
