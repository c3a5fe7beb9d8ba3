"""What sbatch and srun are told: `configs/launcher/*.yaml` build these."""

import re
import shlex
from dataclasses import dataclass, field

from diffx.utils import DiffxError


@dataclass(frozen=True, kw_only=True)
class Srun:
    """`launcher=srun`: inside an allocation, one process per device by srun, requeued when it is told to stop.

    What `slurm/*.sbatch` call. Use it when you submit a batch script of your own.

    Arguments:
        srun: further options of srun, such as `--container-image=FILE`.
        retries: how often a process that was killed or crashed is started again without having got further; being
            stopped by a signal is not counted.

    Raises:
        DiffxError: if `retries` is negative.
    """

    srun: list[str] = field(default_factory=list)
    retries: int = 2

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise DiffxError(f"launcher.retries is {self.retries}; set it to 0 or more")


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """`launcher=slurm`: submits the arms as one array job and returns at once.

    Use it when you sit at a login node. The keys are sbatch's options; what is null is left to the cluster. Any other
    option of sbatch goes into `sbatch`.

    Arguments:
        gpus: GPUs per node, one process each; 0 for `trainer.devices` processes on CPUs.
        nodes: nodes per arm.
        time: the limit of one start, as sbatch takes it (`4:00:00`, `1-12`, minutes); an arm that needs longer is
            requeued and resumes.
        partition: the partition.
        account: whom to charge.
        qos: the quality of service.
        constraint: features of the nodes.
        gres: what stands in `--gres` instead of `gpu:<gpus>`, such as `gpu:a100:4`.
        cpus_per_task: processors per process, for the data workers.
        mem: memory per node, such as `64G`.
        exclude: nodes to avoid.
        reservation: a reservation.
        dependency: jobs to wait for, such as `afterok:123`.
        mail_type: when to send mail, such as `END,FAIL`.
        mail_user: to whom.
        signal: what SLURM sends how long before the time limit, as `SIGNAL@SECONDS`; time enough to save.
        sbatch: further options of sbatch, as `["--licenses=matlab", "--exclusive"]`.
        setup: lines of shell before the start: modules, conda, containers, proxies.
        srun: further options of srun, such as `--container-image=FILE`.
        array_parallelism: how many arms run at the same time; null for as many as fit.
        retries: as for `launcher=srun`.
        snapshot: whether the job runs a copy of the code taken now, so that it does not see later edits.
        wait: whether to stay and show the progress of all arms until they have ended.

    Raises:
        DiffxError: if a number or the signal is impossible.
    """

    gpus: int = 1
    nodes: int = 1
    time: str | int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    cpus_per_task: int | None = 8
    mem: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    signal: str = "USR1@120"
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    array_parallelism: int | None = None
    retries: int = 2
    snapshot: bool = True
    wait: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("gpus", self.gpus, 0),
            ("nodes", self.nodes, 1),
            ("cpus_per_task", self.cpus_per_task, 1),
            ("array_parallelism", self.array_parallelism, 1),
            ("retries", self.retries, 0),
        ):
            if value is not None and value < least:
                raise DiffxError(f"launcher.{name} is {value}; set it to {least} or more")
        name, _, seconds = self.signal.removeprefix("B:").partition("@")
        if name.removeprefix("SIG") not in ("USR1", "USR2", "TERM", "INT") or not seconds.isdigit():
            raise DiffxError(
                f"launcher.signal is '{self.signal}'; write SIGNAL@SECONDS with USR1, USR2, TERM or INT, as USR1@120"
            )
        other = next((o for o in self.sbatch if not o.startswith("-")), None)
        if other is not None:
            raise DiffxError(f"launcher.sbatch holds '{other}', no option of sbatch; write it as --NAME=VALUE")
        if self.gres and (count := re.search(r"gpu.*?(\d+)$", self.gres)) and int(count.group(1)) != self.gpus:
            raise DiffxError(f"launcher.gres={self.gres} asks for other than launcher.gpus={self.gpus}; set both alike")
        if self.signal.startswith("B:"):
            raise DiffxError("launcher.signal=B:… would reach the batch script alone; leave B: out")

    def directives(self, tasks_per_node: int, **more: str) -> list[str]:
        """The options of sbatch, as they stand in a batch script behind `#SBATCH`.

        Arguments:
            tasks_per_node: processes on each node.
            more: further options by their long names, with `_` for `-`.
        """
        gpus = self.gres or (f"gpu:{self.gpus}" if self.gpus else None)
        named = {
            # Lightning takes a job called bash or interactive for none
            "job-name": "diffx",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "reservation": self.reservation,
            "nodes": self.nodes,
            "ntasks-per-node": tasks_per_node,
            "gres": gpus,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "dependency": self.dependency,
            "mail-type": self.mail_type,
            "mail-user": self.mail_user,
            "signal": self.signal,
            # a requeued job would empty its log
            "open-mode": "append",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        return [
            *(f"--{name}={shlex.quote(str(value))}" for name, value in named.items() if value is not None),
            "--requeue",
            *self.sbatch,
        ]


def batch_script(about: list[str], directives: list[str], setup: list[str], command: str) -> str:
    """A batch script: what the launcher submits, and what `slurm/` holds.

    Arguments:
        about: lines of comment at its head.
        directives: options of sbatch.
        setup: lines of shell before the command.
        command: what it executes.
    """
    head = [f"# {line}".rstrip() for line in about]
    return "\n".join(["#!/bin/bash", *head, *(f"#SBATCH {option}" for option in directives), "", *setup, command, ""])
