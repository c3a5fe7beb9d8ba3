"""The training log as a CSV file."""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffx.utils import patiently, write_text


class CSVLogger(Logger):
    """One row per logged step in `metrics.csv`, appended at once; a resumed run goes on where its checkpoint stands.

    (Lightning's own deletes what an earlier process logged into the same folder.)

    Arguments:
        file: the CSV file.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = Path(file)
        self._columns: list[str] = []
        self._known: set[tuple[str, frozenset[str]]] = set()  # rows at the step that a run has resumed at

    @property
    def name(self) -> str:
        """The logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: the run directory is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the frozen config lies beside the file."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Drops the rows after a step: what a run did after its last checkpoint, it will do again."""
        rows = self.rows()
        kept = [row for row in rows if int(row["step"]) <= step]
        self._columns = list(rows[0]) if rows else []
        self._known = {_kind(row) for row in kept if int(row["step"]) == step}
        if len(kept) < len(rows):
            self._rewrite(kept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row; new names become new columns.

        It takes the place of one with the same step and names: what a process did at the step of its last checkpoint,
        and was killed before it could say so there, is done again.
        """
        row = {"step": step, **metrics}
        if _kind(row) in self._known:
            self._known.discard(_kind(row))
            self._rewrite([other for other in self.rows() if _kind(other) != _kind(row)])
        new = [name for name in row if name not in self._columns]
        if new:
            before = self.rows()
            self._columns += new
            self._rewrite(before)
        patiently(lambda: self._append(row))

    def _append(self, row: dict[str, Any]) -> None:
        # one write per row: a killed process leaves whole rows
        with self.file.open("a", newline="", encoding="utf-8") as file:
            file.write(self._text([row]))

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text."""
        if not self.file.is_file():
            return []
        with self.file.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and None not in row]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = self._text([dict(zip(self._columns, self._columns, strict=True)), *rows])
        patiently(lambda: write_text(self.file, text))

    def _text(self, rows: list[Any]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n").writerows(rows)
        return buffer.getvalue()


def _kind(row: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    """The step of a row, and what it tells."""
    return str(row["step"]), frozenset(name for name, value in row.items() if value not in ("", None))
