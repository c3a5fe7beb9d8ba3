"""`python -m diffx.cli.rank RUN_DIR [CHECKPOINT]`: one process of a run, from the run's frozen config.

Started by `diffx train trainer.devices=N`, or on several nodes by torchrun or srun.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from diffx.cli.build import build, check
from diffx.cli.execute import execute
from diffx.experiment import Run
from diffx.utils import DiffxError


def main() -> None:
    """Trains this rank's share and exits with the code of `diffx train`."""
    if len(sys.argv) not in (2, 3):
        print("diffx: usage: python -m diffx.cli.rank RUN_DIR [CHECKPOINT]", file=sys.stderr)
        sys.exit(2)
    if not sys.flags.safe_path:  # a job runs the copy of the code that was taken when it was submitted
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    run = Run(sys.argv[1])
    first = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0") == "0"
    try:
        arm = build(run.config())
        check(arm)
        # who has started the ranks has chosen: they might not see the same files at the same time
        checkpoint = run.resume_from() if len(sys.argv) == 2 else Path(sys.argv[2]) if sys.argv[2] else None
        code = execute(arm, run, Console(quiet=not first), checkpoint)
    except DiffxError as error:
        if first:
            print(f"diffx: {error}", file=sys.stderr)
        code = 2
    if code >= 128 and not first:
        code = 0  # srun kills all others at the first bad exit, and the first rank may still have to write
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
