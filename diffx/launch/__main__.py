"""`python -m diffx.launch RUN_DIR`: what each element of an array job executes."""

import sys

from diffx.experiment import Record, Run
from diffx.experiment.record import command_line
from diffx.launch.supervise import supervise
from diffx.utils import DiffxError


def main() -> None:
    """Runs the arm of this directory from its frozen config, and exits with the code of `diffx train`."""
    if len(sys.argv) != 2:
        sys.exit("diffx: usage: python -m diffx.launch RUN_DIR")
    try:
        run = Run(sys.argv[1])
        config = run.config()
        launcher, trainer = config["launcher"], config["trainer"]
        tasks = trainer["devices"] * trainer["num_nodes"]
        # an earlier start of the same job may still be dying
        with run.lock(patience=60):
            if run.state == "finished":  # a node was lost in the moment between the end and telling SLURM
                print(f"{run.path} is finished")
                sys.exit(0)
            Record.now(command_line()).append_to(run.path)
            rank = ["-P", "-m", "diffx.cli.rank", str(run.path), str(run.resume_from() or "")]
            code = supervise(run, [sys.executable, *rank], tasks, launcher["srun"], launcher["retries"])
    except DiffxError as error:
        print(f"diffx: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
