"""A cluster for the tests of this folder, and diffx on its login node."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, why_not

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "trainer=cpu",
    "backbone=unet_tiny",
    "data.batch_size=16",
    "evaluation.num_samples=200",
    "evaluation.reference=test",
    "evaluation.interim_samples=100",
    "evaluation.batch_size=20",
    "evaluation.per_class=1",
    "metrics=[fd,is]",
    "sampler.steps=3",
    "checkpoint.every_n_steps=40",
    "log_every_n_steps=20",
    "progress_bar=false",
]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with_accounting = Cluster(Path("/tmp") / f"diffx-slurm-{os.getpid()}")  # socket paths must be short
    with_accounting.start()
    yield with_accounting
    with_accounting.stop()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The extractor's statistics, computed once."""
    return tmp_path_factory.mktemp("cache")


class Login:
    """A shell on the login node, in a folder of its own.

    Arguments:
        cluster: the cluster.
        folder: where commands run.
        cache: the user's cache.
    """

    def __init__(self, cluster, folder, cache):
        self.cluster = cluster
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = cluster.environment | {
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(cache),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        }

    def __call__(self, *command, code=0):
        """Runs a command and returns its output.

        Raises:
            AssertionError: if it ends with another code.
        """
        done = subprocess.run(
            [str(word) for word in command], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def diffx(self, *argv, code=0):
        return self(sys.executable, "-m", "diffx.cli.main", *argv, code=code)

    def submit(self, *overrides, launcher=()):
        """Submits TINY arms on CPUs, one process each."""
        slurm = ["launcher.gpus=0", "launcher.cpus_per_task=1", *launcher]
        return self.diffx("train", "-m", "hydra/launcher=slurm", *slurm, *TINY, *overrides)

    def runs(self):
        """All run directories."""
        return sorted(file.parent for file in (self.folder / "runs").glob("*/*/seed*/config.yaml"))

    def wait(self, condition, what, seconds=900):
        """Waits until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{file}\n{file.read_text()[-3000:]}" for file in self.folder.glob("runs/.slurm/*/*.log")]
                raise AssertionError("\n".join([f"not within {seconds} s: {what}", self("squeue", "-a"), *logs]))
            time.sleep(0.3)

    def job(self, number):
        """What SLURM says of a job, on one line."""
        return self("scontrol", "-o", "show", "job", number)

    def finished(self):
        return all(state(run) == "finished" for run in self.runs())

    def idle(self):
        """Whether no job waits or runs."""
        return not self("squeue", "-h", "-t", "PD,R,CG,CF,S").strip()


@pytest.fixture
def login(cluster, tmp_path, cache):
    shell = Login(cluster, tmp_path / "home", cache)
    yield shell
    subprocess.run(["scancel", "-u", "root"], env=shell.environment)
    shell.wait(shell.idle, "an empty queue", 60)


def state(run):
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.is_file() else "waiting"


def step(run):
    return max((int(file.stem.partition("=")[2]) for file in run.glob("checkpoints/step=*.ckpt")), default=0)


def events(run, *names):
    """The ledger's events of these kinds."""
    file = run / "jobs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in rows if not names or row["event"] in names]
