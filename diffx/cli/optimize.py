"""`sweeper=optuna`: a search over settings in which every trial is an ordinary run.

The study in its database says which trials there were; the run directories hold what they did. A search that was killed
goes on by the same command: the trial that was running is finished in its own directory.
"""

import itertools
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from diffx.cli.build import make
from diffx.cli.compose import Arguments, explain
from diffx.cli.grid import with_params
from diffx.cli.train import config_of, train
from diffx.evaluation import Evaluation
from diffx.experiment import Run, fingerprint, identity, locate
from diffx.experiment.identity import INFERENCE
from diffx.utils import DiffxError, nearest

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

Config = dict[str, Any]

_SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler", "cmaes": "CmaEsSampler"}
_PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "none": "NopPruner",
}


class UnknownMetric(DiffxError):  # noqa: N818 (as DiffxError's other kinds, a sentence)
    """What is to be optimised is not measured: no trial could have a value."""


@dataclass(frozen=True)
class Optuna:
    """How to search; names and values are Optuna's.

    Arguments:
        n_trials: trials in all, those of earlier starts included.
        metric: of the final evaluation, such as `fd_digits`; None for the first that is measured.
        direction: `minimize` or `maximize`.
        study_name: the study's name; None for one told by what is searched.
        storage: a database file, or an URL as Optuna takes them; None for `optuna.db` beside the runs.
        sampler: what suggests the next trial.
        sampler_kwargs: further arguments of its class.
        pruner: what stops poor trials, by `eval/<metric>` in training.
        pruner_kwargs: further arguments of its class.
        seed: of the sampler.
    """

    n_trials: int = 20
    metric: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    study_name: str | None = None
    storage: str | None = None
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes"] = "tpe"
    sampler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pruner: Literal["median", "percentile", "successive_halving", "hyperband", "none"] = "median"
    pruner_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise DiffxError(f"sweeper.n_trials is {self.n_trials}; set it to 1 or more")


def optimize(arguments: Arguments) -> int:
    """Runs the search, or the rest of it, and prints its trials; returns the exit code.

    Returns:
        0 if any trial was completed or pruned, 2 if all have failed, 128 + n if signal n has stopped it.

    Raises:
        DiffxError: if the search cannot work, or another process is at it.
    """
    if not arguments.multirun:
        raise DiffxError("sweeper=optuna searches; add -m, and say over what, such as schedule=linear,cosine")
    search = Search.of(replace(arguments, overrides=with_params(arguments)))
    console = Console()
    with search.lock():
        study = search.study()
        if search.settings.sampler == "grid":
            for point in search.grid():
                study.enqueue_trial(point, skip_if_exists=True)
        console.print(f"study {study.study_name} in {search.storage}", highlight=False, soft_wrap=True)
        while (trial := search.next(study)) is not None:
            if code := search.run(study, trial):
                return code
    console.print(table(study))
    done = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    if any(trial.state.name == "COMPLETE" for trial in done):
        best = study.best_trial
        console.print(f"best: trial {best.number}, {best.user_attrs['run']}", highlight=False, soft_wrap=True)
    return 0 if done else 2


@dataclass(frozen=True)
class Search:
    """What is searched.

    Arguments:
        arguments: what was typed.
        settings: how to search.
        fixed: the overrides that all trials share.
        space: the distribution of each key that is searched over.
        config: the config of one point of the space.
    """

    arguments: Arguments
    settings: Optuna
    fixed: list[str]
    space: dict[str, "BaseDistribution"]
    config: Config

    @classmethod
    def of(cls, arguments: Arguments) -> "Search":
        """The search that was typed.

        Raises:
            DiffxError: for every mistake that can be found before the first trial.
        """
        _import()
        fixed, space = _split(arguments)
        about = [word for word in arguments.overrides if re.match(r"\+*sweeper[.=]", word)]
        config = config_of([*fixed, *about, *_words(_first(space))], arguments)
        settings: Optuna = make(config, "sweeper")
        # a misspelt choice, or a bound of another type, would otherwise be found in the middle of the search
        for key, distribution in space.items():
            for value in _extremes(distribution)[1:]:
                config_of([*fixed, *_words(_first(space) | {key: value})], arguments)
        _check(config, settings, space)
        return cls(arguments, settings, fixed, space, config)

    @property
    def folder(self) -> Path:
        """The folder of the experiment's runs."""
        return Path(self.config["runs_dir"]) / str(self.config["name"])

    @property
    def storage(self) -> str:
        """The database, as an URL."""
        asked = self.settings.storage or str(self.folder / "optuna.db")
        return asked if "://" in asked else f"sqlite:///{asked}"

    @property
    def digest(self) -> str:
        """What is searched and measured, as a hash; how it is searched is no part of it."""
        from optuna.distributions import distribution_to_json

        space = {key: distribution_to_json(distribution) for key, distribution in self.space.items()}
        settings = self.settings
        parts = [identity(self.config), self.config["seed"], _protocol(self.config), settings.metric]
        return fingerprint([*parts, settings.direction, space])

    @property
    def name(self) -> str:
        """The study's name."""
        return self.settings.study_name or f"optuna-{self.digest}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from the same study: both would take up the trial that was running.

        Raises:
            DiffxError: if there is one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f".optuna-{fingerprint(self.name)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DiffxError(
                f"another process runs the study {self.name}; wait for it, or choose another sweeper.study_name"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def study(self) -> "Study":
        """The study, from its database if it has begun.

        Raises:
            DiffxError: if the database cannot be opened, or holds another search under this name.
        """
        import optuna

        try:
            study = optuna.create_study(
                storage=self.storage,
                study_name=self.name,
                direction=self.settings.direction,
                pruner=_made("pruner", _PRUNERS[self.settings.pruner], self.settings.pruner_kwargs),
                load_if_exists=True,
            )
        except DiffxError:
            raise
        except Exception as error:  # SQLAlchemy's and the driver's, which share no base class
            raise DiffxError(
                f"the database {self.storage} cannot be used ({str(error).splitlines()[0]}); correct sweeper.storage"
            ) from error
        if study.user_attrs.get("search", self.digest) != self.digest:
            raise DiffxError(
                f"the study {self.name} in {self.storage} is of another search; choose another sweeper.study_name"
            )
        study.set_user_attr("search", self.digest)
        return study

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point, the last axis fastest."""
        values = [_values(distribution) for distribution in self.space.values()]
        for point in itertools.product(*values):
            yield dict(zip(self.space, point, strict=True))

    def next(self, study: "Study") -> "Trial | None":
        """The trial that was running when an earlier process was stopped, else a new one; None when all are done."""
        import optuna

        trials = study.get_trials(deepcopy=False)
        unfinished = next((trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING), None)
        if unfinished is None:
            waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in trials)
            done = sum(trial.state.is_finished() for trial in trials)
            if done >= self.settings.n_trials or (self.settings.sampler == "grid" and not waiting):
                return None
            # a sampler's random numbers are not in the database: one seed per trial, so that a search that was stopped
            # does not begin with the same suggestions again
            study.sampler = self._sampler(done)
            trial = study.ask()
        else:
            study.sampler = self._sampler(unfinished.number)
            trial = optuna.Trial(study, unfinished._trial_id)  # its parameters are in the database
        for key, distribution in self.space.items():
            trial._suggest(key, distribution)
        return trial

    def run(self, study: "Study", trial: "Trial") -> int:
        """Runs a trial and tells the study; returns 0, or 128 + n if signal n has stopped it."""
        import torch
        from optuna.trial import TrialState

        words = _words(trial.params)
        print(f"[{trial.number + 1}/{self.settings.n_trials}] {' '.join(words)}", flush=True)
        try:
            config = config_of([*self.fixed, *words], self.arguments)
            run = locate(config["runs_dir"], config, [*self.fixed, *words])
            trial.set_user_attr("run", str(run.path))
            # pruned by an equal trial, or by a process that was killed before it could tell
            if run.state != "pruned":
                code = train(config, [*self.fixed, *words], lambda step, values: self._prune(trial, step, values))
                if code >= 128:
                    return code
                if code:
                    raise DiffxError(f"training ended with exit code {code}")
            if run.state == "pruned":
                study.tell(trial, state=TrialState.PRUNED)
            else:
                values = _measured(run, config)
                study.tell(trial, _chosen(values, self.settings.metric))
                study.set_user_attr("metric", self.settings.metric or next(iter(values)))
        except UnknownMetric:
            raise
        except (DiffxError, torch.OutOfMemoryError) as error:
            print(f"diffx: {error}", file=sys.stderr)
            trial.set_user_attr("reason", str(error))
            study.tell(trial, state=TrialState.FAIL)
        except Exception as error:
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
            study.tell(trial, state=TrialState.FAIL)
            raise
        return 0

    def _prune(self, trial: "Trial", step: int, values: Mapping[str, float]) -> bool:
        """Reports what was measured in training, and says whether to stop."""
        value = _chosen(values, self.settings.metric)
        known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if step not in known:  # a resumed run measures it again
            trial.report(value, step)
        return trial.should_prune()

    def _sampler(self, number: int) -> Any:
        settings = self.settings
        name = _SAMPLERS.get(settings.sampler, "RandomSampler")  # a grid's points wait in the database
        return _made("sampler", name, {**settings.sampler_kwargs, "seed": settings.seed + number})


def table(study: "Study") -> Table:
    """The trials of a study: state, value (of a pruned one the last that was reported), parameters."""
    trials = [trial for trial in study.trials if trial.state.name != "WAITING"]
    complete = any(trial.state.name == "COMPLETE" for trial in trials)
    best = study.best_trial.number if complete else None
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    title = f"{study.study_name}: {len(trials)} trials, {study.direction.name.lower()}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("trial", justify="right")
    shown.add_column("state")
    shown.add_column(study.user_attrs.get("metric", "value"), justify="right", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", overflow="fold")
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.4g}"
        if trial.state.name == "PRUNED" and trial.last_step is not None:
            value += f" at step {trial.last_step}"
        state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        cells = [str(trial.number), state, value, *(_cell(trial.params.get(name)) for name in names)]
        shown.add_row(*cells, style="bold green" if trial.number == best else "")
    return shown


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _check(config: Config, settings: Optuna, space: Mapping[str, Any]) -> None:
    """Refuses what could only fail after hours."""
    from optuna.distributions import FloatDistribution

    evaluation, trainer = config["evaluation"], config["trainer"]
    if not evaluation["num_samples"]:
        raise DiffxError("a trial's value is that of its final evaluation; set evaluation.num_samples=N")
    if settings.pruner != "none":
        if not (evaluation["every_n_steps"] and evaluation["interim_samples"]):
            raise DiffxError(
                "pruning needs metrics in training: set evaluation.every_n_steps and evaluation.interim_samples, or "
                "sweeper.pruner=none"
            )
        if trainer["devices"] * trainer["num_nodes"] > 1 or config["launcher"]:
            raise DiffxError(
                "pruning needs training in one process: set trainer.devices=1 launcher=local, or sweeper.pruner=none"
            )
    for key, distribution in space.items():
        if settings.sampler == "grid" and isinstance(distribution, FloatDistribution) and distribution.step is None:
            raise DiffxError(f"sweeper.sampler=grid has no end on {key}; give its values, or take sweeper.sampler=tpe")
    name = _SAMPLERS.get(settings.sampler, "RandomSampler")
    _made("sampler", name, {**settings.sampler_kwargs, "seed": settings.seed})
    _made("pruner", _PRUNERS[settings.pruner], settings.pruner_kwargs)


def _import() -> None:
    """Optuna, if it is installed, without its notes on every trial."""
    try:
        import optuna
    except ImportError:
        raise DiffxError("sweeper=optuna needs Optuna: pip install 'diffx[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _made(what: str, name: str, keywords: Mapping[str, Any]) -> Any:
    """A sampler or pruner of Optuna's."""
    import optuna

    try:
        return getattr(getattr(optuna, f"{what}s"), name)(**keywords)
    except (TypeError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise DiffxError(f"Optuna's {name} cannot be made ({said}); correct sweeper.{what}_kwargs") from error


def _split(arguments: Arguments) -> tuple[list[str], dict[str, "BaseDistribution"]]:
    """The overrides that all trials share, and the space."""
    try:
        parsed = OverridesParser.create().parse_overrides(arguments.overrides)
    except HydraException as error:
        raise DiffxError(explain(error, arguments.overrides, "train", arguments.config_dirs)) from error
    fixed: list[str] = []
    space: dict[str, BaseDistribution] = {}
    for override in parsed:
        word, key = str(override.input_line), override.get_key_element()
        if key.startswith("hydra"):
            raise DiffxError(f"'{word}' does not go with sweeper=optuna, which runs trial after trial; leave it out")
        if not override.is_sweep_override():
            fixed += [] if override.key_or_group.partition(".")[0] == "sweeper" else [word]
        elif key == "seed":
            raise DiffxError(f"'{word}': a search over seeds finds the luckiest one; give one seed")
        else:
            space[key] = _distribution(override)
    if not space:
        raise DiffxError(
            "sweeper=optuna has nothing to search; give a range such as optimizer.lr=tag(log,interval(1e-4,1e-2)) or "
            "schedule=linear,cosine"
        )
    return fixed, space


def _distribution(override: Override) -> "BaseDistribution":
    """Hydra's sweep as Optuna's distribution: intervals and ranges are numbers with an order, choices have none."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)  # pyright: ignore[reportArgumentType]
        if isinstance(value, RangeSweep) and not value.shuffle:
            values = sorted(value.range())
            kind = IntDistribution if all(isinstance(v, int) for v in values) else FloatDistribution
            return kind(values[0], values[-1], step=abs(value.step))  # pyright: ignore[reportArgumentType]
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError, HydraException) as error:
        raise DiffxError(f"'{override.input_line}' is no range to search ({error}); correct its ends") from error


def _extremes(distribution: "BaseDistribution") -> list[Any]:
    """Values such that, if they are good, all are: every choice, or both ends."""
    choices = getattr(distribution, "choices", None)
    return list(choices) if choices is not None else [distribution.low, distribution.high]  # pyright: ignore


def _values(distribution: "BaseDistribution") -> list[Any]:
    """All values of a distribution that has an end."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return list(choices)
    low, high, step = distribution.low, distribution.high, distribution.step  # pyright: ignore
    return [low + k * step for k in range(round((high - low) / step) + 1)]


def _first(space: Mapping[str, "BaseDistribution"]) -> dict[str, Any]:
    return {key: _extremes(distribution)[0] for key, distribution in space.items()}


def _words(params: Mapping[str, Any]) -> list[str]:
    """Overrides; choices are kept as they were typed."""
    return [f"{key}={value}" for key, value in params.items()]


def _chosen(values: Mapping[str, float], metric: str | None) -> float:
    if not values:
        raise UnknownMetric("nothing is measured: choose metrics=[fd] and an extractor")
    if metric is not None and metric not in values:
        known = ", ".join(values)
        raise UnknownMetric(f"sweeper.metric={metric} is not measured{nearest(metric, values)}; choose one of {known}")
    return values[metric or next(iter(values))]


def _measured(run: Run, config: Config) -> dict[str, float]:
    """The values of a run's evaluation under a config's protocol, the newest one."""
    for file in sorted(run.evaluations.glob("step=*.json"), reverse=True):
        evaluation = Evaluation.load(file)
        if _protocol(evaluation.settings) == _protocol(config):
            return {name: value.value for name, value in evaluation.values.items()}
    raise DiffxError(f"'{run.path}' has no evaluation of these settings; run the same command again")


def _protocol(settings: Mapping[str, Any]) -> str:
    """What is asked of a trained model, as a hash; how it is computed is no part of it."""
    parts = {key: settings[key] for key in sorted(INFERENCE - {"evaluation"} | {"schedule"})}
    return fingerprint(parts | {key: settings["evaluation"][key] for key in ("num_samples", "reference", "seed")})
