"""`diffx wandb COMMAND`: what was written offline into W&B, and a view of a sweep for it."""

import os
import subprocess
import sys
from pathlib import Path

from diffx.training.loggers.wandb_tracker import has_key, reachable
from diffx.utils import DiffxError, nearest, write_text

COMMANDS = ("sync", "workspace")
BATCH = 200
"""Folders handed to W&B at once."""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    name, *rest = argv or [""]
    if name not in COMMANDS:
        said = f"there is no diffx wandb {name}{nearest(name, COMMANDS)}" if name else "say what to do with W&B"
        raise DiffxError(f"{said}; choose diffx wandb {' or '.join(COMMANDS)}")
    return sync(rest) if name == "sync" else workspace(rest)


def sync(argv: list[str]) -> int:
    """Uploads what runs below some folders have written offline, by W&B's own command.

    Returns:
        Its exit code; 1 where there is no key to upload with.
    """
    every, places = "--all" in argv, [word for word in argv if word != "--all"]
    unknown = next((word for word in places if word.startswith("-")), None)
    if unknown is not None:
        raise DiffxError(f"diffx wandb sync has no option '{unknown}'; it takes folders and --all")
    found = unsynced(places or ["runs"], every)
    if not found:
        print(f"nothing to upload below {', '.join(places or ['runs'])}")
        return 0
    if not has_key():
        print("\n".join(map(str, found)))
        print(f"these {len(found)} would be uploaded, but there is no key for W&B; wandb login, then the same again")
        return 1
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not reachable(url):
        raise DiffxError(
            f"W&B cannot be reached at {url}, and {len(found)} folders are to be uploaded; run this where it can"
        )
    codes = []
    for first in range(0, len(found), BATCH):
        # the parts of a run that was resumed go together, in their order: W&B sees to it within one call
        options = ["--include-online"] if every else []
        batch = map(str, found[first : first + BATCH])
        codes.append(subprocess.run([sys.executable, "-m", "wandb", "sync", *options, *batch], check=False).returncode)
    return max(codes)


def unsynced(places: list[str], every: bool = False) -> list[Path]:
    """The folders below some folders that W&B has written and not uploaded.

    Arguments:
        places: folders of runs, run directories or W&B's own folders.
        every: those written online too, whose end W&B may not have taken.

    Raises:
        DiffxError: if a folder does not exist.
    """
    found = []
    for place in map(Path, places):
        if not place.is_dir():
            raise DiffxError(f"there is no folder '{place}'; give a run directory, or a folder of runs")
        for file in place.rglob("*.wandb"):
            offline = file.parent.name.startswith("offline-run-")
            written = offline or (every and file.parent.name.startswith("run-"))
            if written and not file.with_name(file.name + ".synced").exists():
                found.append(file.parent)
    return sorted(dict.fromkeys(found))


def workspace(argv: list[str]) -> int:
    """Writes the definition of a W&B workspace for a folder of runs, and saves it there where W&B can be reached."""
    from diffx.cli.wandb_workspace import workspace_of

    places, settings = _apart(argv)
    out = Path(settings.pop("out", "workspace.json"))
    view = workspace_of(places or ["runs"], settings.get("project"), settings.get("entity"))
    write_text(out, view.text())
    print(f"workspace   {out}")
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not has_key():
        print("not saved in W&B: there is no key; wandb login, then the same again")
    elif not reachable(url):
        print(f"not saved in W&B: it cannot be reached at {url}; run the same where it can")
    else:
        print(f"saved as    {view.save()}")
    return 0


def _apart(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Folders, and `KEY=VALUE`, `--KEY=VALUE` or `--KEY VALUE`."""
    keys, places, settings, rest = ("out", "project", "entity"), [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if key in keys and (equals or (word.startswith("--") and rest)):
            settings[key] = value if equals else rest.pop(0)
        elif word.startswith("-"):
            raise DiffxError(f"diffx wandb workspace has no option '{word}'{nearest(key, keys)}; it takes out=FILE")
        else:
            places.append(word)
    return places, settings
