"""What was run, on what, with which code, and how to run it again."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffx.compare.arms import text
from diffx.experiment import Collection, Member, identity
from diffx.report.arms import Arm
from diffx.report.numbers import count, number

Rows = list[tuple[str, str]]


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


def root_of(collection: Collection) -> str:
    """The folder that all runs lie in."""
    return os.path.commonpath([member.run.path.parents[1] for member in collection.members])


def run_rows(arms: Sequence[Arm], root: str) -> list[RunRow]:
    """All runs, arm by arm.

    Arguments:
        arms: the arms.
        root: the folder that their directories are named from.
    """
    return [
        RunRow(
            arm,
            member.seed,
            member.state,
            f"{member.status['step']:,}" if isinstance(member.status.get("step"), int) else "–",
            len(member.measurements),
            os.path.relpath(member.run.path, root),
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
    told = [key for key in first if not key.endswith("_partial_")]
    same = [key for key in told if all(config.get(key, missing) == first[key] for config in configs)]
    return [(key, _text(first[key])) for key in same]


def _one_per_arm(members: Iterable[Member]) -> list[Member]:
    return list({member.arm: member for member in members}.values())


def environments(collection: Collection) -> list[tuple[str, str, str]]:
    """Versions, commits and machines: what, of the trainings, of the evaluations; all values where they differ."""
    launches = [_facts(launch) for member in collection.members for launch in _launches(member)]
    measured = [_facts(m.evaluation.environment) for _, m in collection.measurements]
    keys = dict.fromkeys(key for facts in (*measured, *launches) for key in facts)
    return [(key, _all_of(launches, key), _all_of(measured, key)) for key in keys]


def _all_of(records: Sequence[dict[str, str]], key: str) -> str:
    counts = Counter(record[key] for record in records if key in record)
    return _counted(counts) if counts else "–"


def _counted(values: Mapping[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({n}×)" for value, n in sorted(values.items(), key=lambda item: (-item[1], item[0])))


def _facts(record: dict[str, Any]) -> dict[str, str]:
    """What a launch or an evaluation says about its machine and its code."""
    facts = {
        "machine": str(record.get("host", "–")),
        "device": _text(record.get("device", "–")),
        "processes": _text(record.get("processes", "–")),
        "git commit": str(record.get("commit") or "not in a repository"),
        "uncommitted changes": "yes, in diff.patch" if record.get("dirty") else "none",
        "Python": str(record.get("python", "–")),
    }
    return facts | {str(name): str(version) for name, version in (record.get("packages") or {}).items()}


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
        values = Counter(_text(protocol.get(key)) for protocol in flat)
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
    unfinished: dict[tuple[str, str, str, str], list[str]] = {}
    for row in run_rows(arms, root_of(collection)):
        if row.state != "finished":
            unfinished.setdefault((row.arm.label, row.state, row.step, row.reason), []).append(str(row.seed))
    for (label, state, step, reason), seeds in unfinished.items():
        which = f"{label}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
        what = "failed" if state == "failed" else f"not finished, last seen as {state}"
        said.append(f"{which}: {what} at step {step}{f' ({reason})' if reason else ''}.")
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
    return "none" if value == {} else text(value)
