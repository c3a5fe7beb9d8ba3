"""One run's directory."""

import fcntl
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from diffx.experiment.identity import fingerprint, identity, is_identity
from diffx.utils import DiffxError, patiently, write_text


class Run:
    """`runs/<experiment>/<what was overridden>-<hash>/seed<k>/`, everything a run wrote and is.

    Arguments:
        path: the run's directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The frozen, resolved config."""
        return self.path / "config.yaml"

    @property
    def is_run(self) -> bool:
        """Whether a run has been started here."""
        return self.config_file.is_file()

    @property
    def checkpoints(self) -> Path:
        """The folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The inference weights: the EMA of the denoiser, as safetensors."""
        return self.path / "weights" / "ema.safetensors"

    @property
    def samples(self) -> Path:
        """The folder of sample grids."""
        return self.path / "samples"

    @property
    def evaluations(self) -> Path:
        """The folder of evaluations, one JSON each."""
        return self.path / "evaluations"

    def config(self) -> dict[str, Any]:
        """The frozen config.

        Raises:
            DiffxError: if there is none, or it cannot be read.
        """
        if not self.config_file.is_file():
            raise DiffxError(
                f"'{self.path}' is no run directory (it has no config.yaml); give run=DIR, the folder that diffx train "
                "named, ending in seed<k>"
            )
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise DiffxError(
                f"'{self.config_file}' is no valid YAML; restore it, or delete the run directory and train again"
            ) from error
        if not isinstance(config, dict):
            raise DiffxError(f"'{self.config_file}' is empty; delete the run directory and train again")
        return config

    def freeze(self, config: dict[str, Any]) -> None:
        """Writes the config from which all ranks start.

        Raises:
            DiffxError: if another experiment lives in this directory.
        """
        if self.config_file.is_file() and identity(self.config()) != identity(config):
            raise DiffxError(
                f"'{self.path}' holds a run of another config; delete or rename the directory, or choose another name="
            )
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    @property
    def state(self) -> str:
        """`absent`, `running`, `interrupted`, `failed`, `pruned` or `finished`, as last written by the run itself."""
        return self.status().get("state", "absent")

    def status(self) -> dict[str, Any]:
        """The run's last word about itself: `state`, `step`, and `reason` where it failed."""
        file = self.path / "status.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except json.JSONDecodeError:  # not ours: we only ever rename whole files into place
            return {}

    def set_status(self, state: str, **details: Any) -> None:
        """Writes the state with its details."""
        text = json.dumps({"state": state, **details}, indent=1) + "\n"
        patiently(lambda: write_text(self.path / "status.json", text))

    def latest(self) -> dict[str, float]:
        """The newest row of `metrics.csv`, without reading all of it; empty if there is none."""
        try:
            with (self.path / "metrics.csv").open("rb") as file:
                columns = file.readline().decode(errors="replace").strip().split(",")
                file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().decode(errors="replace").splitlines(keepends=True)
        except OSError:
            return {}
        rows = [line.strip().split(",") for line in lines if line.endswith("\n")]
        for row in reversed([row for row in rows if len(row) == len(columns)]):
            found = {name: float(value) for name, value in zip(columns, row, strict=True) if _is_number(value)}
            # a row of an evaluation alone does not say how fast training is
            if "images_per_second" in found:
                return found
        return {}

    @property
    def locked(self) -> bool:
        """Whether a process is at work in this directory, as far as the file system tells."""
        if not self.path.is_dir():
            return False
        try:
            with self.lock():
                return False
        except DiffxError:
            return True

    @contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Keeps a second process from training in this directory at the same time; a killed process leaves no lock.

        Arguments:
            patience: seconds to wait for another process that may just be ending.

        Raises:
            DiffxError: if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        with (self.path / ".lock").open("w") as file:
            while not _try_lock(file):
                if time.monotonic() >= deadline:
                    raise DiffxError(
                        f"another process is training in '{self.path}'; wait for it, or stop it and run this again"
                    )
                time.sleep(0.5)
            yield

    def newest_checkpoint(self, verify: bool = False) -> tuple[Path | None, list[Path]]:
        """The newest whole checkpoint, and newer ones that are damaged.

        A checkpoint is a zip archive: one cut short has lost its directory, which stands at the end. So are its shards,
        if several processes have written it.

        Arguments:
            verify: whether to read all of it and compare its checksums.
        """
        from diffx.training.checkpoint_files import shards_of  # slow to import, and wanted by few commands

        whole = _is_whole if verify else zipfile.is_zipfile
        broken: list[Path] = []
        for file in sorted(self.checkpoints.glob("step=*.ckpt"), key=step_of, reverse=True):
            if whole(file) and all(map(whole, shards_of(file))):
                return file, broken
            broken.append(file)
        return None, broken

    def resume_from(self) -> Path | None:
        """The checkpoint to go on from, verified, or None to start anew; says which damaged ones it passes over."""
        checkpoint, broken = self.newest_checkpoint(verify=True)
        for file in broken:
            print(f"passing over the damaged checkpoint {file}", flush=True)
        return checkpoint


def _is_whole(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error):
        return False


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then it is the user's care
        return True
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def find_runs(*roots: str | Path) -> list[Run]:
    """All runs below some folders, or those folders themselves, sorted by their paths.

    Raises:
        DiffxError: if a folder does not exist.
    """
    found = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise DiffxError(f"there is no folder '{root}'; give a run directory, or a folder of runs")
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "config.yaml" in files and Path(folder).resolve().name.startswith("seed"):
                folders.clear()
                found.append(Run(os.path.normpath(folder)))
    return found


def step_of(checkpoint: Path) -> int:
    """The training step in a checkpoint's name, `step=00001000.ckpt`."""
    match = re.fullmatch(r"step=(\d+)\.ckpt", checkpoint.name)
    return int(match.group(1)) if match else -1


def locate(root: str | Path, config: dict[str, Any], overrides: list[str]) -> Run:
    """The directory of the run that a config describes: the existing one if it has been started, wherever it is named.

    Arguments:
        root: the folder of all runs.
        config: the resolved config.
        overrides: what was typed, such as `["schedule=cosine", "seed=1"]`; names the directory, the hash decides.
    """
    digest = fingerprint(identity(config))
    experiment = Path(root) / str(config["name"])
    arm = next(iter(sorted(experiment.glob(f"*-{digest}"))), experiment / f"{_slug(overrides)}-{digest}")
    return Run(os.path.normpath(arm / f"seed{config['seed']}"))


def _slug(overrides: list[str]) -> str:
    named = sorted(override.lstrip("+") for override in overrides if is_identity(override.partition("=")[0]))
    text = re.sub(r"[^A-Za-z0-9_.,=-]+", "_", ",".join(o for o in named if not o.startswith("name=")))
    return text[:80].strip("_,") or "default"
