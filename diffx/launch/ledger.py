"""What became of a run's jobs: one line per event in `jobs.jsonl`, beside what the run says of itself."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Ledger:
    """The events of one run, oldest first.

    `submitted` (by the launcher), then for each start `started`, and one of `stopped` (by a signal, saved), `died`
    (killed or crashed), `failed` (for its own reasons: it will not be tried again), `finished`; `cancelled` by
    `diffx jobs --cancel`. A job that has put itself back into the queue is `started` once more.

    Arguments:
        run: the run directory.
    """

    def __init__(self, run: str | Path) -> None:
        self.file = Path(run) / "jobs.jsonl"

    def add(self, event: str, **details: Any) -> None:
        """Appends an event with the time, the job and the node.

        Written at once and synced: a job may be killed the moment after.
        """
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
        row |= {"job": job_id(), "node": os.environ.get("SLURMD_NODENAME")} if "SLURM_JOB_ID" in os.environ else {}
        with self.file.open("a", encoding="utf-8") as file:
            # a line cut short by a full disk or a power cut stays a line of its own
            file.write(("\n" if self._torn() else "") + json.dumps(row | details) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All events; lines that cannot be read are passed over."""
        rows = []
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines() if self.file.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "event" in row:
                rows.append(row)
        return rows

    def last(self, event: str) -> dict[str, Any]:
        """The newest event of this kind; empty if there is none."""
        return next((row for row in reversed(self.events()) if row["event"] == event), {})

    @property
    def job(self) -> str:
        """The id of the newest job, `123` or `123_4` for one of an array; empty if none was ever submitted."""
        return next((row["job"] for row in reversed(self.events()) if row.get("job")), "")

    def _torn(self) -> bool:
        try:
            with self.file.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:  # absent or empty
            return False


def job_id() -> str:
    """The id of the job that this process belongs to, as squeue prints it: `123`, or `123_4` in an array; or empty."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
