"""A real SLURM on one Debian machine: slurmctld, two slurmd, munge and accounting, for the tests.

    python tests/slurm/cluster.py install     the packages, as root
    python tests/slurm/cluster.py start       in seconds; prints the line that makes sbatch find it
    python tests/slurm/cluster.py stop

Everything lies in one folder and dies with it; nothing below /etc or /run is touched, so that it does not meet a
cluster that the machine may belong to. Nodes are virtual: both are this machine, with more processors than it has.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PORTS = range(28100, 30000, 20)  # Lightning takes 15000 to 24999 for its own ranks
NODES, CPUS = 2, 16

SLURM_CONF = """\
ClusterName=diffx
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its credential has expired: two minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,nohold_on_prolog_fail
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
ReturnToService=2
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
# not a password: where accounting finds munge
AccountingStoragePass={folder}/munge.socket
{nodes}
# LLN: on the least loaded node, so that arms are spread over both
PartitionName=low Nodes=ALL Default=YES DefaultTime=30 LLN=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL DefaultTime=30 PriorityTier=9 PreemptMode=OFF
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


def why_not() -> str:
    """Why no cluster can be had here; empty if it can."""
    if not Path("/etc/debian_version").is_file():
        return "the SLURM tests need Debian or Ubuntu, whose packages they know"
    if os.geteuid() != 0:
        return "the SLURM tests need root: they start slurmctld, slurmd and munged"
    missing = [package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None]
    return f"the SLURM tests need the packages {' '.join(missing)}: make test-slurm installs them" if missing else ""


def install() -> None:
    """Installs what is missing.

    Raises:
        subprocess.CalledProcessError: if the packages cannot be had.
    """
    missing = [package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None]
    if missing:
        quiet = {
            "check": True,
            "stdout": subprocess.DEVNULL,
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        }
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], **quiet)


class Cluster:
    """A cluster in a folder.

    Arguments:
        folder: where its state, logs and sockets go; short, as socket paths hold 107 characters at most.
        accounting: whether there is a database behind sacct.
    """

    def __init__(self, folder: Path, accounting: bool = True) -> None:
        self.folder = Path(folder)
        self.accounting = accounting
        self.port = PORTS.start
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        # both nodes are this machine: ranks meet on the loopback device
        self.environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH, "MASTER_ADDR": "127.0.0.1"}

    def start(self) -> None:
        """Starts all daemons and waits until the nodes are idle.

        Raises:
            RuntimeError: if they are not within a minute, with the end of the logs.
        """
        self.stop()
        for name in ("state", "munge", *(f"spool/node{k + 1}" for k in range(NODES))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.port = next(port for port in PORTS if all(_free(port + k) for k in range(20)))
        self._configure()
        self._start_munge()
        if self.accounting:
            self._start_database()
        self._call("slurmctld")
        for k in range(NODES):
            self.start_node(f"node{k + 1}")
        self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "low").strip() == str(NODES), 60)

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons."""
        if self._pid("slurmctld") is not None:
            subprocess.run(["scancel", "--user", "root"], env=self.environment, capture_output=True, timeout=30)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h").strip():
                time.sleep(0.2)
        nodes = [f"slurmd.node{k + 1}" for k in range(NODES)]
        for name in ("slurmctld", *nodes, "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        self._kill_leftovers()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, name: str) -> None:
        """Starts one node, after `kill_node` again."""
        self._call("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power cut does: the node's daemons and every process of its jobs are gone at once."""
        self._end(f"slurmd.{name}", signal.SIGKILL)
        # the daemons first: they would still report that their jobs have died
        for process in Path("/proc").glob("[0-9]*"):
            if self._holds(process, f"{self.folder}/slurmd.{name}.log"):
                _kill(int(process.name))
        node, ours = f"SLURMD_NODENAME={name}\0".encode(), f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            environment = _environment(process)
            if node in environment and ours in environment:
                _kill(int(process.name))

    def run(self, *command: str) -> str:
        """The output of a client command such as squeue; empty if it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def _configure(self) -> None:
        nodes = "\n".join(
            f"NodeName=node{k + 1} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={self.port + 10 + k} "
            f"CPUs={CPUS} RealMemory=64000 State=UNKNOWN"
            for k in range(NODES)
        )
        values = {
            "folder": self.folder,
            "host": socket.gethostname(),
            "port": self.port,
            "dbd_port": self.port + 1,
            "sql_port": self.port + 2,
            "nodes": nodes,
        }
        text = SLURM_CONF.format(**values)
        if not self.accounting:
            text = (
                "\n".join(line for line in text.splitlines() if not line.startswith(("Accounting", "JobAcct"))) + "\n"
            )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "slurmdbd.conf").write_text(DBD_CONF.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = self.folder / "munge"
        munge.chmod(0o755)
        files = {"key": key, "pid": self.folder / "munged.pid", "log": munge / "log", "seed": munge / "seed"}
        options = [f"--{name}-file={file}" for name, file in files.items()]
        self._call("munged", "--force", f"--socket={self.folder}/munge.socket", *options)

    def _start_database(self) -> None:
        data, sock = self.folder / "sql", self.folder / "sql.socket"
        self._call(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        with (self.folder / "mariadbd.log").open("wb") as log:
            server = subprocess.Popen(
                [
                    "mariadbd",
                    "--no-defaults",
                    "--user=root",
                    f"--datadir={data}",
                    f"--socket={sock}",
                    f"--port={self.port + 2}",
                    "--bind-address=127.0.0.1",
                    "--innodb-flush-log-at-trx-commit=0",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=self.environment,
            )
        (self.folder / "mariadbd.pid").write_text(str(server.pid))
        client = ["mariadb", "--no-defaults", "-uroot", f"--socket={sock}", "-e"]
        self._wait(
            lambda: subprocess.run([*client, "select 1"], env=self.environment, capture_output=True).returncode == 0, 60
        )
        self._call(*client, "create database accounting; grant all on accounting.* to slurm@'%' identified by 'slurm'")
        self._call("slurmdbd")
        self._wait(lambda: "Cluster" in self.run("sacctmgr", "show", "cluster"), 60)

    def _call(self, *command: str) -> None:
        # output to a file: a daemon would keep a pipe open
        with (self.folder / "start.log").open("ab") as log:
            subprocess.run(
                command, env=self.environment, check=True, timeout=120, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = [
                    f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in self.folder.glob("*.log")
                ]
                raise RuntimeError("the cluster does not come up\n" + "\n".join(logs))
            time.sleep(0.1)

    def _pid(self, name: str) -> int | None:
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
            # no zombie, and no other process that has come by the number
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (OSError, ValueError):
            return None
        program, state = stat.split("(")[1].split(")")[0], stat.split(") ")[1][0]
        return pid if state not in "ZX" and name.startswith(program[:8]) else None

    def _end(self, name: str, number: int = signal.SIGTERM) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + 15
        while self._alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        _kill(pid)

    def _alive(self, pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
        except OSError:
            return False

    def _holds(self, process: Path, path: str) -> bool:
        try:
            return any(str(handle.readlink()).startswith(path) for handle in (process / "fd").iterdir())
        except OSError:
            return False

    def _kill_leftovers(self) -> None:
        """Processes of jobs whose daemon was killed."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            environment = _environment(process)
            if ours in environment and b"SLURM_JOB_ID=" in environment and int(process.name) != os.getpid():
                _kill(int(process.name))


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended
        return b""


def _free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["install", "start", "stop"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "diffx-slurm")
    options = parser.parse_args()
    if options.what == "install":
        install()
        return
    if reason := why_not():
        sys.exit(reason)
    cluster = Cluster(options.folder)
    if options.what == "stop":
        cluster.stop()
        return
    cluster.start()
    print(f"export SLURM_CONF={options.folder}/slurm.conf MASTER_ADDR=127.0.0.1")


if __name__ == "__main__":
    main()
