"""sbatch, squeue, sacct, scontrol and scancel, asked in one place."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffx.utils import DiffxError

LIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
"""States of a job that may still do something."""


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job.

    Arguments:
        state: such as `PENDING`, `RUNNING`, `CANCELLED`, `NODE_FAIL`, `OUT_OF_MEMORY`.
        reason: why it waits, such as `Priority`, or nothing.
        node: where it runs.
        left: the time left, such as `3:59:10`, or nothing.
    """

    state: str
    reason: str = ""
    node: str = ""
    left: str = ""

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE


def available() -> bool:
    """Whether there is a SLURM to talk to."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def submit(script: Path, *arguments: str) -> str:
    """Submits a batch script and returns the job's id.

    Arguments:
        script: the file.
        arguments: options of sbatch, such as `--array=0-7%4`.

    Raises:
        DiffxError: what sbatch says if it refuses, or if there is none.
    """
    if not available():
        raise DiffxError(
            "there is no sbatch here; submit from a login node of the cluster, or leave launcher=slurm out"
        )
    return _call("sbatch", "--parsable", *arguments, str(script)).strip().split(";")[0]


def queue(jobs: Iterable[str]) -> dict[str, Job]:
    """The jobs that SLURM still knows, by their ids, `123` or `123_4`.

    Arguments:
        jobs: ids; array jobs are asked for as a whole, in one call for all.
    """
    ids = sorted({job.partition("_")[0] for job in jobs if job})
    if not ids or not available():
        return {}
    # one line for each array element, also of those that wait
    text = _try("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%N|%L")
    if not text and len(ids) > 1:  # one id that SLURM has forgotten spoils the whole question
        return {key: job for one in ids for key, job in queue([one]).items()}
    found = {}
    for line in text.splitlines():
        key, state, reason, node, left = (line.split("|") + [""] * 5)[:5]
        found[key] = Job(state, "" if reason == "None" else reason, node, left if state == "RUNNING" else "")
    return found


def accounting(jobs: Iterable[str]) -> dict[str, Job]:
    """What the accounting remembers of jobs that squeue has forgotten; nothing where there is none."""
    ids = sorted({job for job in jobs if job})
    if not ids or shutil.which("sacct") is None:
        return {}
    text = _try(
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={','.join(ids)}",
        "--format=JobID,State,NodeList",
    )
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    return {key: Job(state.split(" ")[0], node=node) for key, state, node in rows}


def cancel(jobs: Iterable[str]) -> None:
    """Cancels jobs; those that have ended are left alone."""
    ids = sorted({job for job in jobs if job})
    if ids:
        _call("scancel", *ids)


def requeue(job: str) -> bool:
    """Puts a job back into the queue, and says whether SLURM agreed; what runs of it is killed.

    A job that its user has cancelled is left alone.
    """
    if _cancelled(_try("scontrol", "show", "job", job)):
        return False
    try:
        _call("scontrol", "requeue", job)
    except DiffxError:
        return False
    return True


def _cancelled(said: str) -> bool:
    """Whether what scontrol says of a job means that its user wants it to end.

    SLURM would requeue a cancelled job as gladly as any other. While its processes end it calls it COMPLETING, as it
    does a job that has used up its time: that one is known by its time.
    """
    found = dict(re.findall(r"(\w+)=(\S+)", said))
    if found.get("JobState") == "COMPLETING":
        used, limit = _seconds(found.get("RunTime", "")), _seconds(found.get("TimeLimit", ""))
        return used is None or limit is None or used < limit
    return found.get("JobState") == "CANCELLED"


def _seconds(time: str) -> int | None:
    """Seconds of `1-02:03:04`; None for `UNLIMITED`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", time)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _try(*command: str) -> str:
    try:
        return _call(*command)
    except DiffxError:
        return ""


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise DiffxError(f"there is no {command[0]} here; call diffx on a node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise DiffxError(f"SLURM does not answer {command[0]} within a minute; try again later") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DiffxError(f"{command[0]} refuses: {said}; correct launcher=… or its keys")
    return done.stdout
