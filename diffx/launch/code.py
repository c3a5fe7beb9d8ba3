"""The code as it is when a job is submitted: queued jobs must not see later edits."""

import shutil
import subprocess
from pathlib import Path

import diffx
from diffx.utils import DiffxError

LIMIT = 64 * 2**20


def snapshot(destination: Path, project: Path) -> list[Path]:
    """Copies the code that a job would import from folders that may still be edited.

    Those are diffx itself, where it is not installed but linked to a working copy, and the project that diffx is called
    in: the files that git tracks, and new Python and YAML files; outside a repository, the Python and YAML files there
    and in its packages.

    Arguments:
        destination: where the copies go.
        project: the folder that diffx is called in.

    Returns:
        The folders to put on the job's import path, first ones first.

    Raises:
        DiffxError: if the project's code is larger than 64 MiB, or cannot be written.
    """
    package = Path(diffx.__file__).parent
    found = []
    try:
        if "site-packages" not in package.parts:
            found.append(_copy(package.parent, ["diffx", "configs"], destination / "diffx"))
        if project.resolve() != package.parent.resolve():
            found.append(_copy(project, _code_of(project), destination / "project"))
    except OSError as error:
        raise DiffxError(
            f"cannot copy the code to '{destination}': {error.strerror or error}; free some space, or set "
            "launcher.snapshot=false"
        ) from error
    return found


def _code_of(project: Path) -> list[str]:
    tracked = _git(project, "ls-files", "-z")
    if tracked is None:
        return [
            str(file.relative_to(project))
            for pattern in ("*.py", "*.yaml", "*/*.py", "*/*.yaml", "*/*/*.py")
            for file in project.glob(pattern)
        ]
    new = _git(project, "ls-files", "-z", "--others", "--exclude-standard", "*.py", "*.yaml") or ""
    return [name for name in (tracked + new).split("\0") if name and (project / name).is_file()]


def _copy(folder: Path, names: list[str], destination: Path) -> Path:
    size = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    if size > LIMIT:
        raise DiffxError(
            f"the code in '{folder}' to be copied for the job is {size / 2**20:.0f} MiB; keep data out of git, or set "
            "launcher.snapshot=false"
        )
    for name in names:
        source, target = folder / name, destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    return destination


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
