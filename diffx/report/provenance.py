"""What was run, on what, with which code, and how to run it again."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffx.experiment import Collection, Member, identity
from diffx.report.arms import Arm, level
from diffx.report.numbers import count, number

Rows = list[tuple[str, str]]

_CODE = ("command", "time")
"""What differs from launch to launch anyway."""


@dataclass(frozen=True)
class RunRow:
    """One run in the table of runs.

    Arguments:
        arm: its arm.
        seed: its seed.
        state: its last word about itself.
        step: where it stands.
        evaluations: how many it has.
        path: its directory.
        reason: why it failed; empty if it did not.
    """

    arm: Arm
    seed: int
    state: str
    step: str
    evaluations: int
    path: str
    reason: str


@dataclass(frozen=True)
class Repeat:
    """A number and how to get it again.

    Arguments:
        arm: its arm.
        seed: its seed.
        value: the number with its standard error.
        nfe: function evaluations per sample.
        images: the number of images.
        command: what to type.
    """

    arm: Arm
    seed: int
    value: str
    nfe: str
    images: str
    command: str


def run_rows(arms: Sequence[Arm]) -> list[RunRow]:
    """All runs, arm by arm."""
    return [
        RunRow(
            arm,
            member.seed,
            member.state,
            f"{member.status['step']:,}" if isinstance(member.status.get("step"), int) else "–",
            len(member.measurements),
            str(member.run.path),
            str(member.status.get("reason", "")) if member.state == "failed" else "",
        )
        for arm in arms
        for member in arm.members
    ]


def shared_config(collection: Collection) -> Rows:
    """What all arms have in common, by dotted key."""
    configs = [_flat(identity(member.config)) for member in _one_per_arm(collection.members)]
    first = configs[0]
    missing = object()
    same = [key for key in first if all(config.get(key, missing) == first[key] for config in configs)]
    return [(key, _text(first[key])) for key in same]


def _one_per_arm(members: Iterable[Member]) -> list[Member]:
    return list({member.arm: member for member in members}.values())


def environments(collection: Collection) -> Rows:
    """Versions, commits and machines of all trainings and evaluations; several values where they differ."""
    found: dict[str, dict[str, int]] = {}
    for member in collection.members:
        for launch in _launches(member):
            _note(found, "training", launch)
        for measurement in member.measurements:
            _note(found, "evaluation", measurement.evaluation.environment)
    return [(key, _counted(values)) for key, values in found.items()]


def _counted(values: dict[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({n}×)" for value, n in sorted(values.items(), key=lambda item: (-item[1], item[0])))


def _note(found: dict[str, dict[str, int]], phase: str, record: dict[str, Any]) -> None:
    names = {"commit": "git commit", "dirty": "uncommitted changes", "host": "machine", "python": "Python"}
    for key, value in record.items():
        if key in _CODE:
            continue
        parts = value.items() if isinstance(value, dict) else [(names.get(key, key), value)]
        for name, part in parts:
            text = {True: "yes (diff.patch)", False: "none", "": "not in a repository"}.get(part, _text(part))
            counts = found.setdefault(f"{name}, {phase}", {})
            counts[text] = counts.get(text, 0) + 1


def _launches(member: Member) -> list[dict[str, Any]]:
    """The launches of a run, oldest first; lines that cannot be read are passed over."""
    file = member.run.path / "launches.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def protocols(collection: Collection, metric: str) -> tuple[Rows, Rows]:
    """How the metric was measured: what all evaluations share, and what differs between them with all its values."""
    measured = [m.evaluation.protocol for _, m in collection.measurements if metric in m.evaluation.values]
    flat = [_flat({key: v for key, v in p.items() if key not in ("identity", "seed", "times")}) for p in measured]
    shared: Rows = []
    different: Rows = []
    for key in dict.fromkeys(key for protocol in flat for key in protocol):
        if key.endswith("_partial_"):
            continue
        values: dict[str, int] = {}
        for protocol in flat:
            text = _text(protocol.get(key))
            values[text] = values.get(text, 0) + 1
        (shared if len(values) == 1 else different).append((key, _counted(values)))
    return shared, different


def trainings(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """The commands that started the trainings, each once, with the arms that came of it."""
    found: dict[str, dict[str, None]] = {}
    for arm in arms:
        for member in arm.members:
            launches = [launch["command"] for launch in _launches(member) if launch.get("command")]
            if launches:
                found.setdefault(str(launches[0]), {})[f"{arm.label}, seed {member.seed}"] = None
    return [(command, "; ".join(names)) for command, names in found.items()]


def repeats(arms: Sequence[Arm], metric: str) -> list[Repeat]:
    """Every value of the metric with the command that measures it again, digit by digit."""
    found = []
    for arm in arms:
        for member in arm.members:
            for measurement in member.measurements:
                evaluation = measurement.evaluation
                if metric not in evaluation.values:
                    continue
                value = evaluation.values[metric]
                error = "" if value.stderr is None else f" ± {number(value.stderr, value.stderr)}"
                nfe = evaluation.protocol.get("nfe")
                command = f"diffx evaluate repeat={shlex.quote(str(measurement.file))}"
                shown = number(value.value, value.stderr) + error
                row = Repeat(arm, member.seed, shown, "–" if nfe is None else f"{nfe:g}", f"{value.n:,}", command)
                found.append(row)
    return found


def broken(collection: Collection, arms: Sequence[Arm], metric: str) -> list[str]:
    """What a reader has to know about runs that are not whole, one sentence each."""
    said = [problem if problem.endswith(".") else f"{problem}." for problem in collection.problems]
    for row in run_rows(arms):
        name = f"{row.arm.label}, seed {row.seed}"
        if row.state == "failed":
            said.append(f"{name} has failed at step {row.step}{f': {row.reason}' if row.reason else ''}.")
        elif row.state != "finished":
            said.append(f"{name} is not finished (its last word: {row.state}, step {row.step}).")
    for arm in arms:
        bare = [m for m in arm.members if all(metric not in x.evaluation.values for x in m.measurements)]
        if len(bare) == len(arm.members):
            said.append(f"{arm.label} has no {metric} yet and is missing from the comparison.")
        elif bare:
            seeds = ", ".join(str(member.seed) for member in bare)
            said.append(f"{arm.label} has no {metric} of {count(len(bare), 'seed')} ({seeds}).")
    return list(dict.fromkeys(said))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "none" if value is None or value == {} else level(value)
