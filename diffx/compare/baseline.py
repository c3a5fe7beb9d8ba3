"""What the rows of a comparison are held against."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from diffx.compare.arms import name_of, text
from diffx.utils import DiffxError, nearest


class _Row(Protocol):
    @property
    def arm(self) -> dict[str, Any]: ...
    @property
    def point(self) -> dict[str, Any]: ...
    @property
    def cells(self) -> dict[str, Any]: ...
    @property
    def values(self) -> Mapping[int, object]: ...
    @property
    def mismatch(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=_Row)


def chosen_baseline(
    rows: Sequence[_Row], asked: str | Mapping[str, Any] | None, keys: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The cells of the baseline, and sentences about how it was chosen.

    Where only one arm has the cells asked for, they are all of this arm's; keys that are left out after that are each
    row's own: each arm is compared with the baseline at the same number of steps, and each schedule with the same
    parameterization.

    Arguments:
        rows: the rows.
        asked: words such as `schedule=cosine` or `cosine`, with commas, or cells; None for the first arm with the most
            seeds.
        keys: the columns.

    Raises:
        DiffxError: if no row has these cells, or a word can be several.
    """
    if not rows:
        return {}, []
    if asked is None:
        several = any(row.arm != rows[0].arm for row in rows)
        # of those that most can be compared with, which max takes the first of
        first = max(rows, key=lambda row: 0 if row.mismatch else len(row.values))
        cells = first.arm if several else first.point
        return dict(cells), [f"no --baseline was named, the first arm is taken: {name_of(cells)}"] if cells else []
    words = _words(asked) if isinstance(asked, str) else [(key, text(value)) for key, value in asked.items()]
    cells: dict[str, Any] = {}
    for key, word in words:
        key, value = _cell(rows, keys, key, word)
        cells[key] = value
    found = [row for row in rows if _has(row, cells)]
    if not found:
        raise DiffxError(f"no row is {name_of(cells)}; the rows are {'; '.join(name_of(row.cells) for row in rows)}")
    if all(row.arm == found[0].arm for row in found):
        cells = {**found[0].arm, **cells}
    return cells, []


def baseline_rows(rows: Sequence[R], cells: Mapping[str, Any]) -> list[R | None]:
    """For each row the one with these cells, and otherwise its own, that it is held against; None where none is."""
    found = {_key(row.cells): row for row in rows}
    return [found.get(_key({**row.cells, **cells})) for row in rows]


def _words(asked: str) -> list[tuple[str, str]]:
    # not at the commas of a list
    parts = re.split(r",(?![^\[]*\])", asked)
    return [(key.strip(), word.strip()) if sign else ("", key.strip()) for key, sign, word in
            (part.partition("=") for part in parts if part.strip())]  # fmt: skip


def _cell(rows: Sequence[_Row], keys: Sequence[str], key: str, word: str) -> tuple[str, Any]:
    """The column and the value that a word means."""
    if key and key not in keys:
        raise DiffxError(f"--baseline: there is no column '{key}'{nearest(key, keys)}; there is {', '.join(keys)}")
    values = {(name, text(row.cells[name])): row.cells[name] for row in rows for name in ([key] if key else keys)}
    found = [name for name, written in values if written == word]
    if len(found) != 1:
        known = list(dict.fromkeys(written for _, written in values))
        what = f"'{word}' can be {' or '.join(found)}" if found else f"no row has {key + '=' if key else ''}{word}"
        raise DiffxError(
            f"--baseline: {what}{nearest(word, known) if not found else ''}; write KEY=VALUE, as {_some(values)}"
        )
    return found[0], values[found[0], word]


def _some(values: Mapping[tuple[str, str], Any]) -> str:
    return ", ".join(f"{key}={word}" for key, word in list(values)[:6])


def _has(row: _Row, cells: Mapping[str, Any]) -> bool:
    return all(text(row.cells[key]) == text(value) for key, value in cells.items())


def _key(cells: Mapping[str, Any]) -> str:
    return repr(sorted((key, text(value)) for key, value in cells.items()))
