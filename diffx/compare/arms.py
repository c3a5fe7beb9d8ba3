"""Which evaluations of a collection are compared, and which of them make one row."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffx.compare.known import ruler
from diffx.experiment import Collection, Measurement, Member, fingerprint
from diffx.experiment.collection import flat
from diffx.utils import DiffxError, nearest

ABOUT = ("step", "seed", "identity")
"""What a protocol says of the run; its hash leaves it out."""


@dataclass(frozen=True)
class Group:
    """What makes one row: one arm, sampled in one way.

    Arguments:
        arm: the value of each column that tells arms apart.
        point: the value of each column that tells ways of sampling apart.
        runs: the run of each seed.
        found: the evaluations of each seed; empty where none holds the metric.
    """

    arm: dict[str, Any]
    point: dict[str, Any]
    runs: dict[int, Member] = field(default_factory=dict)
    found: dict[int, list[Measurement]] = field(default_factory=dict)


def final(collection: Collection) -> tuple[Collection, list[str]]:
    """The last evaluations of whole runs, one run for each arm and seed, and sentences about what is left out."""
    notes, kept, open_, unmeasured = [], [], [], []
    early = 0
    by_seed: dict[tuple[str, int], list[Member]] = {}
    for member in collection.members:
        last = [m for m in member.measurements if _is_final(member, m)]
        early += len(member.measurements) - len(last)
        if member.state != "finished" and not last:
            open_.append(f"{member.run.path} ({member.state}{_step(member)})")
        elif not last:
            unmeasured.append(str(member.run.path))
        else:
            by_seed.setdefault((member.arm, member.seed), []).append(replace(member, measurements=last))
    if open_:
        notes.append(f"not finished, and left out: {listed(open_)}; diffx jobs tells more")
    if unmeasured:
        told = f"finished, but with no evaluation of the last step: {listed(unmeasured)}"
        notes.append(f"{told}; diffx evaluate run={unmeasured[0]} measures")
    if early:
        notes.append(f"{early} evaluation{'s' * (early > 1)} of earlier training steps left out")
    for same in by_seed.values():
        first = max(same, key=lambda member: len(member.measurements))
        kept.append(first)
        if len(same) > 1:
            others = [str(member.run.path) for member in same if member is not first]
            notes.append(f"the same arm and seed again, and left out: {listed(others)}; used: {first.run.path}")
    return Collection(kept, collection.problems), notes


def edited(collection: Collection) -> list[str]:
    """A sentence about evaluations whose protocol is no longer what its hash was made of."""
    files = [
        str(measurement.file)
        for _, measurement in collection.measurements
        if fingerprint({k: v for k, v in measurement.evaluation.protocol.items() if k not in ABOUT})
        != measurement.evaluation.fingerprint
    ]
    if not files:
        return []
    return [
        f"edited by hand since measured, or written by another version (the protocol has another hash): {listed(files)}"
    ]


def own(collection: Collection) -> tuple[Collection, list[str]]:
    """For each run the evaluation with the run's own settings; of a run without one all of them."""
    members, further = [], 0
    for member in collection.members:
        mine = [m for m in member.measurements if all(member.config.get(k) == v for k, v in m.settings.items())]
        members.append(replace(member, measurements=mine or member.measurements))
        further += len(member.measurements) - len(mine or member.measurements)
    said = "further evaluations, with other settings than the run's own, are left out; name them in --by, as in"
    example = f"--by {','.join(list(collection.points)[:1])}"
    return Collection(members, collection.problems), [f"{further} {said} {example}"] if further else []


def columns(collection: Collection, by: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """What tells rows apart: the keys asked for, then all others that differ; and sentences about these.

    Raises:
        DiffxError: if there is no such key.
    """
    differing = [*collection.axes, *collection.points]
    if by is None:
        return differing, []
    notes = []
    known = {key for member in collection.members for key in collection.keys(member)}
    for key in by:
        if key in differing:
            continue
        if key not in known:
            what = f"these runs differ in {', '.join(differing)}" if differing else "these runs differ in nothing"
            raise DiffxError(f"there is no axis '{key}'{nearest(key, [*differing, *known])}; {what}")
        notes.append(f"{key} is the same in all of these runs")
    others = [key for key in differing if key not in by]
    if others:
        notes.append(
            f"rows differ also in {', '.join(others)}, which --by does not name: they stay apart, and what they differ "
            "by may be due to that"
        )
    return [*(key for key in by if key in differing), *others], notes


def grouped(collection: Collection, keys: Sequence[str], metric: str) -> tuple[list[Group], list[str]]:
    """The rows, in the order of their cells; ways of sampling at which no run has the metric are left out."""
    groups: dict[str, Group] = {}
    for k, (member, measurement) in enumerate(collection.measurements):
        arm = {key: collection.axes[key][member.arm] for key in keys if key in collection.axes}
        point = {key: collection.points[key][k] for key in keys if key in collection.points}
        group = groups.setdefault(repr((member.arm, _key(point))), Group(arm, point))
        group.runs[member.seed] = member
        found = group.found.setdefault(member.seed, [])
        if metric in measurement.evaluation.values:
            found.append(measurement)
    measured = {_key(group.point) for group in groups.values() if any(group.found.values())}
    kept = [group for group in groups.values() if _key(group.point) in measured]
    kept.sort(key=lambda group: [_order((group.arm | group.point)[key]) for key in keys])
    missing = [
        f"{name_of(group.arm | group.point)} (seed {listed(map(str, sorted(lacking)))})"
        for group in kept
        if (lacking := [seed for seed, found in group.found.items() if not found])
    ]
    notes = []
    if missing:
        run = next(g.runs[s].run.path for g in kept for s, found in g.found.items() if not found)
        notes.append(f"{metric} was not measured of {listed(missing)}; diffx evaluate run={run} metrics=… does")
    return kept, notes


def one_each(
    groups: Sequence[Group], metric: str, allow: bool
) -> tuple[list[tuple[Group, dict[int, Measurement], list[str]]], list[str]]:
    """One evaluation for each seed of each row, all by one ruler.

    Arguments:
        groups: the rows.
        metric: the metric.
        allow: take evaluations by other rulers where there are none by the one that most rows have.

    Returns:
        Each row with its evaluations by seed, and what was measured otherwise in it; and sentences about that.

    Raises:
        DiffxError: if no ruler is that of all rows, and this is not allowed.
    """
    by_ruler: dict[str, set[tuple[int, int]]] = {}
    rulers: dict[str, dict[str, Any]] = {}
    samples: dict[str, float] = {}
    for k, group in enumerate(groups):
        for seed, found in group.found.items():
            for measurement in found:
                with_ = ruler(measurement.evaluation.protocol, metric)
                name = json.dumps(with_, sort_keys=True, default=str)
                rulers[name], samples[name] = with_, measurement.evaluation.values[metric].n
                by_ruler.setdefault(name, set()).add((k, seed))
    order = sorted(by_ruler, key=lambda name: (-len(by_ruler[name]), -samples[name], name))
    cells = set().union(*by_ruler.values())
    notes = []
    if len(order) > 1:
        different = unequal([rulers[name] for name in order])
        if by_ruler[order[0]] != cells and not allow:
            raise DiffxError(_mismatch(metric, different, groups, by_ruler, order))
        count = sum(len(found) for group in groups for found in group.found.values()) - len(cells)
        told = "; ".join(f"{key} {' or '.join(values)}" for key, values in different.items())
        if by_ruler[order[0]] == cells:
            notes.append(f"measured more than once ({told}): {count} evaluations left out, {_first(different)} used")
    rows = []
    for k, group in enumerate(groups):
        chosen: dict[int, Measurement] = {}
        otherwise: dict[str, list[str]] = {}
        for seed, found in group.found.items():
            name = next((name for name in order if (k, seed) in by_ruler[name]), None)
            if name is None:
                continue
            same = [
                m
                for m in found
                if json.dumps(ruler(m.evaluation.protocol, metric), sort_keys=True, default=str) == name
            ]
            chosen[seed] = max(same, key=lambda m: (str(m.evaluation.environment.get("time", "")), m.file.name))
            otherwise |= unequal([rulers[order[0]], rulers[name]])
        rows.append((group, chosen, [f"{key} {values[-1]}, not {values[0]}" for key, values in otherwise.items()]))
    return rows, notes


def unequal(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all of some tables: the values in their order, each once, by dotted keys."""
    rows = [flat(table) for table in tables]
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = list(dict.fromkeys(_short(row.get(key)) for row in rows))
        if len(values) > 1:
            found[key] = values
    return found


def name_of(cells: Mapping[str, Any]) -> str:
    """A row in words."""
    return ", ".join(f"{key}={text(value)}" for key, value in cells.items()) or "the only arm"


def text(value: Any) -> str:
    """A cell in words, as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def listed(words: Iterable[str], most: int = 4) -> str:
    """Words with commas; of many the first ones."""
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _is_final(member: Member, measurement: Measurement) -> bool:
    """Whether it measured the end of the training; the best weights of a whole training may be earlier ones."""
    protocol, said = measurement.evaluation.protocol, member.status.get("step")
    whole = member.state == "finished"
    end = said if whole and said else member.config.get("training", {}).get("max_steps")
    return (whole and protocol.get("weights") == "best") or (protocol.get("step") or 0) >= (end or 0)


def _step(member: Member) -> str:
    steps = member.config.get("training", {}).get("max_steps")
    return f", step {member.status['step']} of {steps}" if "step" in member.status else ""


def _mismatch(
    metric: str,
    different: Mapping[str, list[str]],
    groups: Sequence[Group],
    by_ruler: Mapping[str, set[tuple[int, int]]],
    order: Sequence[str],
) -> str:
    """The sentence that says what was measured otherwise, of which rows, and what to do."""
    told = "; ".join(f"{key} {' or '.join(values)}" for key, values in different.items())
    others = sorted(set().union(*by_ruler.values()) - by_ruler[order[0]])
    rows = listed(dict.fromkeys(name_of(groups[k].arm | groups[k].point) for k, _ in others))
    return (
        f"{metric} was not measured equally ({told}): otherwise than most is {rows}; evaluate all runs with the same "
        "settings, as diffx evaluate -m run='FOLDER/*/seed*' evaluation.num_samples=N, or add --allow-mismatch"
    )


def _first(different: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{key} {values[0]}" for key, values in different.items())


def _short(value: Any) -> str:
    word = text(value)
    return f"{word[:8]}…" if len(word) > 40 else word


def _key(cells: Mapping[str, Any]) -> str:
    return repr(sorted((key, text(value)) for key, value in cells.items()))


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if number else (1, 0.0, text(value))
