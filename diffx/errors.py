"""One kind of error for the user's mistakes."""

import difflib
from collections.abc import Iterable


class DiffxError(Exception):
    """A mistake the user can mend: the message is one sentence that names the mistake and the remedy.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint `" (did you mean 'cosine'?)"`, or `""` where nothing in `choices` resembles `word`."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
