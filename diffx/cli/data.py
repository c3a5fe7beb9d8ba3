"""`diffx data COMMAND`."""

import importlib
import re

from diffx.utils import DiffxError, nearest

COMMANDS = ("pack", "inspect", "encode")
_SETTING = re.compile(r"[+~]*[A-Za-z_][\w.@]*=")


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    name, *rest = argv or [""]
    if name not in COMMANDS:
        said = f"there is no diffx data {name}{nearest(name, COMMANDS)}" if name else "say what to do with data"
        raise DiffxError(f"{said}; choose diffx data {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    return importlib.import_module(f"diffx.cli.data_{name}").main(rest)


def places_and_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes paths and `KEY=VALUE` words apart; a path with `=` in it is one if it has a slash before."""
    places = [word for word in argv if not _SETTING.match(word) and not word.startswith("-")]
    return places, [word for word in argv if word not in places]
