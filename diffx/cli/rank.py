"""`python -m diffx.cli.rank RUN_DIR`: one process of a distributed run, from the run's frozen config.

Started by `diffx train trainer.devices=N`, or on several nodes by torchrun or srun.
"""

import os
import sys

from rich.console import Console

from diffx.cli.build import build, check
from diffx.cli.execute import execute
from diffx.experiment import Run
from diffx.utils import DiffxError


def main() -> None:
    """Trains this rank's share and exits with the code of `diffx train`."""
    if len(sys.argv) != 2:
        print("diffx: usage: python -m diffx.cli.rank RUN_DIR", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    run = Run(sys.argv[1])
    first = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0") == "0"
    try:
        arm = build(run.config())
        check(arm)
        code = execute(arm, run, Console(quiet=not first))
    except DiffxError as error:
        if first:
            print(f"diffx: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
