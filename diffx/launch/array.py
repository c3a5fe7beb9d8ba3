"""Several arms as one array job."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from diffx.experiment import Run
from diffx.launch.code import snapshot
from diffx.launch.ledger import Ledger
from diffx.launch.scheduler import submit
from diffx.launch.slurm import Slurm, batch_script
from diffx.utils import DiffxError, write_text


def submit_array(runs: Sequence[Run], slurm: Slurm, tasks_per_node: int, folder: Path, about: str) -> str:
    """Submits one job for a run, or an array with an element for each of several; returns the job's id at once.

    Arguments:
        runs: run directories with their frozen configs.
        slurm: what sbatch is told.
        tasks_per_node: processes on each node.
        folder: where the batch script, the list of arms, the batch log and the copy of the code go.
        about: what is submitted, for the script's head.

    Raises:
        DiffxError: if sbatch refuses, or something cannot be written.
    """
    folder = folder / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    arms = folder / "arms.txt"
    write_text(arms, "".join(f"{run.path.resolve()}\n" for run in runs))
    paths = snapshot(folder / "code", Path.cwd()) if slurm.snapshot else [Path.cwd()]
    several = len(runs) > 1
    log = f"{folder.resolve()}/{'%A_%a' if several else '%j'}.log"
    setup = [*slurm.setup, f"export PYTHONPATH={shlex.quote(':'.join(str(path.resolve()) for path in paths))}"]
    setup[-1] += '${PYTHONPATH:+":$PYTHONPATH"}'
    line = f'"$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {shlex.quote(str(arms.resolve()))})"'
    script = batch_script(
        [about, "Written by diffx train launcher=slurm."],
        slurm.directives(tasks_per_node, chdir=str(Path.cwd()), output=log),
        setup,
        # exec: the shell would not pass signals on; -P: from the copy of the code, not from where it was called
        f"exec {shlex.quote(sys.executable)} -P -m diffx.launch {line}",
    )
    write_text(folder / "job.sbatch", script)
    throttle = f"%{slurm.array_parallelism}" if slurm.array_parallelism else ""
    try:
        job = submit(folder / "job.sbatch", *([f"--array=0-{len(runs) - 1}{throttle}"] if several else []))
    except DiffxError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for k, run in enumerate(runs):
        element = f"{job}_{k}" if several else job
        log = str(folder.resolve() / f"{element}.log")
        Ledger(run.path).add("submitted", job=element, script=str((folder / "job.sbatch").resolve()), log=log)
    return job
