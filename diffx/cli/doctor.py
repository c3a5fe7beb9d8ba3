"""`diffx doctor`: what this machine, and a compute node, have of what a run needs."""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffx.cli.compose import Arguments, parse, refuse_sweep
from diffx.cli.launch import launch
from diffx.cli.train import config_of
from diffx.experiment.record import PACKAGES, Record
from diffx.launch import Slurm
from diffx.launch.scheduler import available
from diffx.utils import DiffxError

OK, NOTE, BAD = "ok", "note", "bad"
MEBIBYTES = 64
SKEW = 2.0
"""Seconds by which two clocks may differ."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Arguments:
        name: what was looked at.
        level: `ok`, `note` (works, but you may want to know) or `bad` (a run would fail).
        text: what was found, and the remedy.
    """

    name: str
    level: str
    text: str


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 1 if something is bad."""
    if argv[:1] == ["--node"]:
        return _on_node(argv[1:])
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    config = config_of(arguments.overrides, arguments)
    console = Console()
    here = examine(config, arguments, login="nodes" in config["launcher"])
    places = {platform.node(): here}
    if "nodes" in config["launcher"]:
        there = _compute_node(config, argv)
        places[f"{there['host']} (compute node)"] = [Finding(**row) for row in there["findings"]]
        places["both"] = _skew(there)
    for place, findings in places.items():
        console.print(_table(place, findings))
    bad = sum(finding.level == BAD for findings in places.values() for finding in findings)
    console.print(f"{bad} to mend" if bad else "[green]all is well[/]")
    return 1 if bad else 0


def examine(config: dict[str, Any], arguments: Arguments, login: bool) -> list[Finding]:
    """Looks at this machine.

    Arguments:
        config: of the arm that is to run.
        arguments: what was typed.
        login: whether the arm is to run elsewhere, so that devices are not missed here.
    """
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("versions", _versions),
        ("devices", lambda: _devices(config, login)),
        ("processes", lambda: _processes(config, login)),
        ("SLURM", lambda: _slurm(config)),
        ("runs_dir", lambda: _folder("runs_dir", Path(config["runs_dir"]))),
        ("cache", lambda: _folder("cache", Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx")),
        ("/dev/shm", _shared_memory),
        ("internet", _internet),
        ("W&B", lambda: _wandb(config)),
        ("the arm", lambda: _arm(config)),
    ]
    found = []
    for name, look in looks:
        try:
            found.append(look())
        except DiffxError as error:
            found.append(Finding(name, BAD, str(error)))
        except Exception as error:  # whatever a strange machine comes up with is a finding
            found.append(Finding(name, BAD, f"{type(error).__name__}: {error}"))
    return found


def _versions() -> Finding:
    record = Record.now([])
    said = ", ".join(f"{name} {record.packages[name]}" for name in PACKAGES)
    commit = f", commit {record.commit[:10]}{' with changes' if record.dirty else ''}" if record.commit else ""
    return Finding("versions", OK, f"Python {record.python}, {said}{commit}")


def _devices(config: dict[str, Any], login: bool) -> Finding:
    import torch

    wanted = config["trainer"]["devices"] if config["trainer"]["accelerator"] in ("gpu", "cuda") else 0
    if not torch.cuda.is_available():
        text = f"no GPU, {os.cpu_count()} CPU cores, torch built for CUDA {torch.version.cuda or 'none'}"
        if wanted and not login:
            return Finding("devices", BAD, f"{text}; set trainer=cpu, or check nvidia-smi and the driver")
        return Finding("devices", OK, text)
    names = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    text = ", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in names)
    if wanted > len(names) and not login:
        return Finding("devices", BAD, f"{text}: {len(names)}, and trainer.devices={wanted}; ask for fewer")
    return Finding("devices", OK, f"{text}; CUDA {torch.version.cuda}")


def _processes(config: dict[str, Any], login: bool) -> Finding:
    """Two processes, or one for each GPU, add up their ranks."""
    import torch

    gpus = 0 if login else torch.cuda.device_count()
    backend, count = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    started = time.perf_counter()
    code = launch(["-m", "diffx.cli.doctor", "--add", backend], count)
    seconds = time.perf_counter() - started
    if code:
        return Finding(
            "processes",
            BAD,
            f"{count} processes do not find each other by {backend}; see above, and try NCCL_DEBUG=INFO",
        )
    return Finding("processes", OK, f"{count} processes have met by {backend} in {seconds:.0f} s")


def _add(backend: str) -> None:
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, rank=rank, world_size=count)
    total = torch.tensor(float(rank), device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    dist.destroy_process_group()
    sys.exit(0 if total.item() == count * (count - 1) / 2 else 1)


def _slurm(config: dict[str, Any]) -> Finding:
    level = BAD if "nodes" in config["launcher"] else NOTE
    if not available():
        return Finding("SLURM", level if level == BAD else OK, "none here: launcher=slurm works from a login node only")
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%P|%D|%t|%G|%l"], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        return Finding("SLURM", level, f"sinfo does not answer: {' '.join(done.stderr.split())}")
    rows = [line.split("|") for line in done.stdout.split("\n") if line]
    said = "; ".join(f"{p}: {n} nodes {state}, {gres}, limit {limit}" for p, n, state, gres, limit in rows)
    memory = "" if shutil.which("sacct") else " (no accounting: states of old jobs come from the ledger alone)"
    return Finding("SLURM", OK, said.replace("(null)", "no GPUs") + memory)


def _folder(name: str, path: Path) -> Finding:
    """Whether a folder can be written, locked and renamed in, and how fast."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return Finding(name, BAD, f"'{existing}' cannot be written; choose another folder ({name}=… or XDG_CACHE_HOME)")
    with tempfile.TemporaryDirectory(dir=existing, prefix=".diffx-doctor-") as folder:
        file, block = Path(folder) / "a", os.urandom(2**20)
        started = time.perf_counter()
        with file.open("wb") as opened:
            for _ in range(MEBIBYTES):
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
        written = time.perf_counter() - started
        skew = file.stat().st_mtime - time.time()
        file.rename(Path(folder) / "b")
        locks = _locks(Path(folder) / "lock")
    free = shutil.disk_usage(existing).free / 2**30
    text = f"'{path.absolute()}': {MEBIBYTES / written:.0f} MiB/s written and synced, {free:.0f} GiB free"
    if abs(skew) > SKEW + written:
        return Finding(name, NOTE, f"{text}; its clock is {skew:+.0f} s off this machine's: results are not affected")
    if not locks:
        return Finding(name, NOTE, f"{text}; it has no file locks: see yourself that a run is started once only")
    return Finding(name, NOTE if free < 5 else OK, text + ("; make room for checkpoints" if free < 5 else ""))


def _locks(path: Path) -> bool:
    import fcntl

    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("/dev/shm", NOTE, "absent: data.num_workers=0 if loaders fail")
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("/dev/shm", OK if free >= 1 else NOTE, f"{free:.1f} GiB for batches on their way from data workers")


def _internet() -> Finding:
    with contextlib.suppress(OSError), socket.create_connection(("github.com", 443), timeout=3):
        return Finding("internet", OK, "reachable")
    return Finding("internet", NOTE, "none: weights, data and statistics have to lie here already (see: the arm)")


def _wandb(config: dict[str, Any]) -> Finding:
    from diffx.training.loggers import has_key

    if "wandb" not in config["logger"]:
        return Finding("W&B", OK, "not asked for (logger=wandb)")
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    why = {"offline": "; wandb sync RUN/wandb/offline-* afterwards, or wandb login now"}.get(mode, "")
    return Finding("W&B", OK, mode + why)


def _arm(config: dict[str, Any]) -> Finding:
    """The code can be imported; data, weights and reference statistics are there."""
    from diffx.cli.build import build, check

    arm = build(config)
    check(arm, here=False)
    parameters = sum(p.numel() for p in arm.module.denoiser.parameters())
    text = f"{parameters / 1e6:.2f} M parameters; {arm.source.describe()}"
    extractor = arm.evaluator.extractor
    if not config["evaluation"]["num_samples"] or not extractor.dim:
        return Finding("the arm", OK, f"{text}; no metrics are asked for")
    return Finding("the arm", OK, f"{text}; extractor {extractor.name} and its reference are at hand")


def _compute_node(config: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """What the same examination finds on a compute node."""
    slurm = Slurm(**{key: value for key, value in config["launcher"].items() if key != "_target_"})
    asked = [o for o in slurm.directives(1) if not o.startswith(("--nodes", "--signal", "--open-mode", "--requeue"))]
    command = ["srun", "--ntasks=1", "--nodes=1", *asked, sys.executable, "-m", "diffx.cli.doctor", "--node", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if line is None:
        raise DiffxError(f"no compute node could be asked: {' '.join(done.stderr.split())[-400:]}; correct launcher=…")
    return json.loads(line) | {"asked": time.time()}


def _on_node(argv: list[str]) -> int:
    arguments = parse(argv)
    config = config_of(arguments.overrides, arguments)
    findings = [asdict(finding) for finding in examine(config, arguments, login=False)]
    packages = Record.now([]).packages
    report = {"host": os.environ.get("SLURMD_NODENAME", platform.node()), "findings": findings, "packages": packages}
    print(json.dumps(report | {"python": platform.python_version(), "time": time.time()}))
    return 0


def _skew(there: dict[str, Any]) -> list[Finding]:
    mine = Record.now([]).packages | {"Python": platform.python_version()}
    theirs = there["packages"] | {"Python": there["python"]}
    other = [f"{name} {mine[name]} here and {theirs[name]} there" for name in mine if mine[name] != theirs.get(name)]
    seconds = there["time"] - there["asked"]
    return [
        Finding("versions", BAD, f"{'; '.join(other)}: use one environment")
        if other
        else Finding("versions", OK, "the same"),
        # the answer has been under way for a moment
        Finding("clocks", NOTE if abs(seconds) > SKEW else OK, f"{seconds:+.1f} s apart"),
    ]


def _table(place: str, findings: list[Finding]) -> Table:
    shown = Table(title=place, title_justify="left", show_header=False)
    colours = {OK: "green", NOTE: "yellow", BAD: "red"}
    for finding in findings:
        shown.add_row(finding.name, f"[{colours[finding.level]}]{finding.level}[/]", escape(finding.text))
    return shown


if __name__ == "__main__":
    if sys.argv[1] == "--add":
        _add(sys.argv[2])
    sys.exit(main(sys.argv[1:]))
