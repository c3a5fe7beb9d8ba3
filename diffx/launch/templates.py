"""`python -m diffx.launch.templates slurm`: batch scripts to submit by hand, from where the launcher's come."""

import sys
from pathlib import Path

from diffx.launch.slurm import Slurm, batch_script
from diffx.utils import write_text

COMMON = [
    "USR1 comes two minutes before the time limit. diffx then saves at the next step, and the job goes back into the",
    "queue; so it does after a preemption. Started again, the same command finds its run directory and resumes.",
]
SETUP = ["source .venv/bin/activate  # or: module load …, conda activate …"]


EVALUATE = """\
trap : TERM USR1  # the shell lives on; srun passes them to diffx, which keeps what it has measured
srun diffx evaluate -m "$@" && exit
code=$?
# not where the user has cancelled it: then it is no longer running
[ "$code" -gt 128 ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING && scontrol requeue "$SLURM_JOB_ID"
exit "$code\""""


def templates() -> dict[str, str]:
    """The scripts by their file names."""
    train = 'exec diffx train launcher=srun "$@"'
    return {
        "one_gpu.sbatch": _script(
            [
                "One arm on one GPU:",
                "  sbatch slurm/one_gpu.sbatch trainer=gpu schedule=cosine parameterization=v seed=1",
            ],
            Slurm(time="4:00:00"),
            train,
        ),
        "one_node.sbatch": _script(
            [
                "One arm on the eight GPUs of a node, a process each:",
                "  sbatch slurm/one_node.sbatch trainer=gpu experiment=ddpm_cifar10",
            ],
            Slurm(gpus=8, time="12:00:00"),
            train,
        ),
        "several_nodes.sbatch": _script(
            [
                "One arm on four nodes; the global batch stays what the experiment says:",
                "  sbatch slurm/several_nodes.sbatch trainer=gpu experiment=ddpm_cifar10",
                "  sbatch --nodes=8 slurm/several_nodes.sbatch trainer=gpu …",
            ],
            Slurm(gpus=8, nodes=4, time="12:00:00"),
            train,
        ),
        "array.sbatch": _script(
            [
                "One arm for each line of a file of overrides, at most four at a time:",
                "  printf '%s\\n' 'schedule=linear seed=0' 'schedule=cosine seed=0' > arms.txt",
                "  sbatch --array=1-$(wc -l < arms.txt)%4 slurm/array.sbatch arms.txt",
            ],
            Slurm(time="4:00:00"),
            'exec diffx train launcher=srun $(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")',
        ),
        "evaluate.sbatch": _script(
            [
                "A job that follows another: train, and when that has finished, measure.",
                "  job=$(sbatch --parsable slurm/one_gpu.sbatch trainer=gpu schedule=cosine name=mine)",
                "  sbatch --dependency=afterok:${job} slurm/evaluate.sbatch 'run=runs/mine/*/seed*' sampler=ddim,heun",
                "A requeued job has not finished: the second waits for its last start.",
            ],
            Slurm(time="2:00:00"),
            EVALUATE,
            [],
        ),
    }


def _script(about: list[str], slurm: Slurm, command: str, common: list[str] = COMMON) -> str:
    directives = slurm.directives(max(slurm.gpus, 1), output="%x-%j.log")
    return batch_script([*about, *common], directives, SETUP, command)


def main() -> None:
    """Writes the scripts into a folder."""
    for name, text in templates().items():
        write_text(Path(sys.argv[1]) / name, text)


if __name__ == "__main__":
    main()
