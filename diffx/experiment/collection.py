"""Many runs as tables: what differs between them, what was measured, how they learned."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from diffx.evaluation import Evaluation
from diffx.experiment.identity import INFERENCE, fingerprint, identity
from diffx.experiment.run import Run, find_runs
from diffx.utils import DiffxError, nearest

Config = dict[str, Any]

_QUESTIONS = tuple(sorted(INFERENCE - {"evaluation", "extractor", "metrics", "likelihood"}))
"""The settings of an evaluation that say how was sampled; the others say how was measured."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a run.

    Arguments:
        file: its JSON.
        evaluation: what it holds.
        settings: how was sampled: sampler, discretization, guidance and so on; the schedule where it is not the one
            that was trained on.
        choices: their names in the config groups, such as `{"sampler": "ddim"}`.
    """

    file: Path
    evaluation: Evaluation
    settings: Config
    choices: dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One run of a collection.

    Arguments:
        run: its directory.
        config: its frozen config.
        arm: the hash of what it is, its seed aside: equal for the seeds of one arm.
        status: its last word about itself.
        measurements: its evaluations, in the order of their files' names.
    """

    run: Run
    config: Config
    arm: str
    status: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config["seed"]

    @property
    def state(self) -> str:
        """As `Run.state`."""
        return self.status.get("state", "absent")


def read_runs(*roots: str | Path) -> "Collection":
    """Reads all runs below some folders.

    What cannot be read is named in `Collection.problems`, and the rest is there.

    Arguments:
        roots: folders of runs, or run directories.

    Raises:
        DiffxError: if a folder does not exist, or there is no run below any.
    """
    # a folder and one inside it hold the same runs
    runs = list({run.path.resolve(): run for run in find_runs(*roots)}.values())
    if not runs:
        raise DiffxError(f"there is no run below {' or '.join(map(repr, map(str, roots)))}; diffx train makes them")
    members, problems, known = [], [], {}
    for run in runs:
        try:
            config = _config(run, known)
            # what everything below reads of it
            lacking = [key for key in ("name", "seed", "schedule", "data") if key not in config]
            if lacking:
                raise DiffxError(f"its config.yaml lacks {', '.join(lacking)}")
            status = run.status()
            if not isinstance(status, dict):
                raise DiffxError("its status.json is damaged; delete it, and diffx train writes it again")
            members.append(Member(run, config, fingerprint(identity(config)), status))
        except (DiffxError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            reason = error if isinstance(error, DiffxError) else f"its config.yaml lacks something ({error!r})"
            problems.append(f"{run.path} is left out: {reason}")
            continue
        for file in sorted(run.evaluations.glob("step=*.json")):
            try:
                members[-1].measurements.append(_measurement(file, config))
            except (DiffxError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{file} is left out: {error}")
    return Collection(members, problems)


class Collection:
    """Runs with what was measured of them, and as tables.

    Arguments:
        members: the runs.
        problems: what could not be read, one sentence each.
    """

    def __init__(self, members: Sequence[Member], problems: Iterable[str] = ()) -> None:
        self.members = list(members)
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def axes(self) -> dict[str, dict[str, Any]]:
        """What differs between arms: its value for each arm, by the key that sets it.

        A config group is told by its choice (`schedule: cosine`); below a group only those keys count that differ
        between arms of the same choice.
        """
        arms = {member.arm: member for member in self.members}
        found = _differing(
            [flat(_told(member.config)) for member in arms.values()],
            [_choices(member.config, member.config.get("choices", {})) for member in arms.values()],
        )
        names = [str(member.config["name"]) for member in arms.values()]
        if len(set(names)) > 1:
            found = {"experiment": names, **found}
        return {key: dict(zip(arms, values, strict=True)) for key, values in found.items()}

    @cached_property
    def points(self) -> dict[str, list[Any]]:
        """What differs in how was sampled, between all evaluations: values in the order of `measurements`."""
        found = [measurement for _, measurement in self.measurements]
        return _differing([flat(m.settings) for m in found], [_choices(m.settings, m.choices) for m in found])

    @cached_property
    def measurements(self) -> list[tuple[Member, Measurement]]:
        """All evaluations with their runs."""
        return [(member, measurement) for member in self.members for measurement in member.measurements]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row per run, indexed by its directory.

        Columns: `experiment`, `arm` (hash), `seed`, `state`, `step`, a column for each of `axes`, and the last row of
        the training log (`images`, `images_per_second`, `loss` and so on).
        """
        rows = [
            self._who(member)
            | {"state": member.state, "step": member.status.get("step")}
            | {key: value for key, value in member.run.latest().items() if key != "step"}
            for member in self.members
        ]
        return pd.DataFrame(rows).set_index("run")

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """A row per evaluation.

        Columns: `run`, `experiment`, `arm`, `seed`, a column for each of `axes` and of `points`, `step`, `nfe`,
        `num_samples`, `protocol` (hash), each metric's value under its name and standard error under
        `<name>_stderr`, `seconds` and `file`.
        """
        rows = []
        for k, (member, measurement) in enumerate(self.measurements):
            evaluation, protocol = measurement.evaluation, measurement.evaluation.protocol
            row = self._who(member) | {key: values[k] for key, values in self.points.items()}
            row |= {"step": protocol.get("step"), "nfe": evaluation.nfe, "num_samples": protocol.get("num_samples")}
            row["protocol"] = evaluation.fingerprint
            for name, value in evaluation.values.items():
                row |= {name: value.value} | ({} if value.stderr is None else {f"{name}_stderr": value.stderr})
            rows.append(row | {"seconds": evaluation.seconds.get("total"), "file": str(measurement.file)})
        return pd.DataFrame(rows)

    @cached_property
    def history(self) -> pd.DataFrame:
        """All rows of all training logs (`metrics.csv`), with `run`, `experiment`, `arm`, `seed` and the `axes`."""
        tables = []
        for member in self.members:
            try:
                table = pd.read_csv(member.run.path / "metrics.csv", on_bad_lines="skip")
            except (OSError, ValueError):  # not begun, or empty
                continue
            tables.append(table.assign(**{key: _cell(value) for key, value in self._who(member).items()}))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def keys(self, member: Member) -> Config:
        """What a run is, by groups and dotted keys, with its seed and experiment."""
        named = _choices(member.config, member.config.get("choices", {}))
        kept = identity(member.config)
        who = {"seed": member.seed, "experiment": member.config["name"]}
        return flat(kept) | {key: choice for key, choice in named.items() if key in kept} | who

    def where(self, wanted: Mapping[str, Sequence[str]]) -> "Collection":
        """The runs and evaluations that have one of the values asked for of every key.

        Arguments:
            wanted: values as they are typed, by key: of a run (`schedule`, `schedule.s`, `seed`, `experiment`) or of an
                evaluation (`sampler`, `sampler.steps`, `evaluation.num_samples`, `weights`).

        Raises:
            DiffxError: if no run has such a key, or none such a value.
        """
        members = self.members
        for key, words in wanted.items():
            seen: dict[str, None] = {}
            kept = []
            for member in members:
                told = self.keys(member)
                if key in told:
                    seen[_word(told[key])] = None
                    kept += [member] if _is_one_of(told[key], words) else []
                    continue
                found = []
                for measurement in member.measurements:
                    asked = _asked(measurement)
                    if key in asked:
                        seen[_word(asked[key])] = None
                        found += [measurement] if _is_one_of(asked[key], words) else []
                kept += [replace(member, measurements=found)] if found else []
            if not seen:
                known = dict.fromkeys(name for member in members for name in self.keys(member))
                known |= dict.fromkeys(name for m in members for e in m.measurements for name in _asked(e))
                raise DiffxError(f"there is no key '{key}' in these runs{nearest(key, known)}; select by one they have")
            if not kept:
                raise DiffxError(f"no run has {key}={','.join(words)}; there is {key}={','.join(sorted(seen))}")
            members = kept
        return Collection(members, self.problems)

    def _who(self, member: Member) -> dict[str, Any]:
        who = {"run": str(member.run.path), "experiment": member.config["name"], "arm": member.arm, "seed": member.seed}
        return who | {key: values[member.arm] for key, values in self.axes.items()}


def _config(run: Run, known: dict[str, Config]) -> Config:
    """The frozen config; parsed once for all seeds of an arm, since YAML is slow to read."""
    try:
        text = run.config_file.read_text(encoding="utf-8")
        # the only line in which two seeds differ
        seed = next(line for line in text.splitlines() if line.startswith("seed:"))
        value = int(seed.partition(":")[2])
    except (OSError, StopIteration, ValueError):
        return run.config()  # says what is wrong
    shared = text.replace(f"\n{seed}\n", "\n", 1)
    if shared not in known:
        try:
            known[shared] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            return run.config()
    return known[shared] | {"seed": value}


def _measurement(file: Path, config: Config) -> Measurement:
    evaluation = Evaluation.load(file)
    settings = {key: evaluation.settings[key] for key in _QUESTIONS if key in evaluation.settings}
    # the same words as on the command line, but not to be mistaken for the schedule of the training
    if evaluation.settings.get("schedule", config["schedule"]) != config["schedule"]:
        settings["sampling schedule"] = evaluation.settings["schedule"]
    choices = evaluation.settings.get("choices", config.get("choices", {}))
    chosen = {key: choices[key] for key in settings if key in choices}
    if "sampling schedule" in settings and "schedule" in choices:
        chosen["sampling schedule"] = choices["schedule"]
    return Measurement(file, evaluation, settings, chosen)


def _asked(measurement: Measurement) -> Config:
    """What was asked of a trained model in an evaluation, by groups and dotted keys."""
    settings = measurement.evaluation.settings
    return flat(measurement.settings) | flat(settings) | _choices(measurement.settings, measurement.choices)


def _word(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_one_of(value: Any, words: Sequence[str]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return any(_number(word) == value for word in words)
    return _word(value) in words


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _told(config: Config) -> Config:
    """What an arm is, without what follows from the rest."""
    told = identity(config)
    told.pop("name")
    training = told.get("training", {})
    if any(training.get(key) is not None for key in ("max_images", "max_flops")):
        told["training"] = {key: value for key, value in training.items() if key != "max_steps"}
    return told


def _choices(config: Config, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The name of each part: that of its choice, or where none is known that of its class."""
    named = {}
    for key, value in config.items():
        if isinstance(value, dict) and "_target_" in value:
            named[key] = chosen.get(key, str(value["_target_"]).rpartition(".")[2])
    return named


def _differing(tables: Sequence[Config], choices: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same everywhere, with their values; None where there is no such key."""
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(chain.from_iterable(choices)):
        values = [chosen.get(key) for chosen in choices]
        if any(value != values[0] for value in values):
            found[key] = values
    for key in dict.fromkeys(chain.from_iterable(tables)):
        head = key.partition(".")[0]
        by_choice: dict[str, set[str]] = {}
        for values, chosen in zip(tables, choices, strict=True):
            if key in values:
                by_choice.setdefault(repr(chosen.get(head)), set()).add(repr(_plain(values[key])))
        # without a group, a key that is missing somewhere differs too
        missing = head not in found and any(key not in values for values in tables)
        if missing or any(len(values) > 1 for values in by_choice.values()):
            found[key] = [values.get(key) for values in tables]
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> Config:
    """Values by their dotted keys."""
    found: Config = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _cell(value: Any) -> Any:
    """A value that a column of a table takes as one."""
    return str(value) if isinstance(value, list | tuple | dict) else value


def common_folder(runs: Sequence[Run]) -> Path:
    """The folder that all of some runs lie in."""
    return Path(os.path.commonpath([os.path.abspath(run.path) for run in runs]))  # noqa: PTH100
