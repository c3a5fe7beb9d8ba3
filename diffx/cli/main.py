"""`diffx COMMAND …`: light to import, so that help answers at once."""

import importlib
import os
import signal
import sys

from diffx.cli.help import COMMANDS, command_help, overview, topic
from diffx.errors import DiffxError, nearest


def main(argv: list[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 2 a mistake (one sentence on stderr), 128 + n stopped by signal n.

    Arguments:
        argv: what was typed after `diffx`; `sys.argv[1:]` by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = run(argv)
    except DiffxError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process says it for all
            print(f"diffx: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("diffx: interrupted; run the same command again to go on", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Runs a command and returns its exit code."""
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("-V", "--version", "version"):
        from diffx import __version__

        print(f"diffx {__version__}")
        return 0
    if name not in COMMANDS:
        raise DiffxError(f"there is no command '{name}'{nearest(name, COMMANDS)}; diffx --help lists them")
    if any(argument in ("-h", "--help") for argument in arguments):
        print(command_help(topic(name, arguments)))
        return 0
    # OpenMP threads that spin while they wait lose most of the speed where another process has one of the cores
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # the user's own package is found beside where diffx is called, as with python -m
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    module = importlib.import_module(f"diffx.cli.{name.replace('-', '_')}")
    return module.main(arguments)


if __name__ == "__main__":
    main()
