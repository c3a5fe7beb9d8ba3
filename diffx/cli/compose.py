"""From what was typed to a resolved config, or to one sentence."""

import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from diffx.cli.parallel import Parallel
from diffx.cli.paths import config_dir, groups
from diffx.cli.types import check_types
from diffx.utils import DiffxError, nearest


@dataclass
class Arguments:
    """A command's arguments, apart.

    Arguments:
        overrides: `KEY=VALUE` and `GROUP=CHOICE`.
        multirun: whether `-m` was given.
        show: whether `--cfg` was given.
        config_dirs: the user's own config folders.
    """

    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    show: bool = False
    config_dirs: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Arguments:
    """Takes a command's arguments apart.

    Raises:
        DiffxError: for an unknown option or something that is no `KEY=VALUE`.
    """
    arguments = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-m", "--multirun"):
            arguments.multirun = True
        elif word in ("-c", "--cfg"):
            arguments.show = True
        elif word in ("-cd", "--config-dir") or word.startswith("--config-dir="):
            _, _, value = word.partition("=")
            if not value and not rest:
                raise DiffxError("--config-dir needs a folder: --config-dir DIR")
            folder = Path(value or rest.pop(0)).expanduser()
            if not folder.is_dir():
                raise DiffxError(
                    f"there is no folder '{folder}' for --config-dir; give the one that holds your YAML files"
                )
            arguments.config_dirs.append(str(folder.resolve()))
        elif word.startswith("-"):
            options = ("--multirun", "--cfg", "--config-dir", "--help")
            raise DiffxError(f"there is no option '{word}'{nearest(word, options)}; --help lists them")
        elif "=" not in word and not word.startswith("~"):
            raise DiffxError(f"'{word}' is no setting; write KEY=VALUE or GROUP=CHOICE, such as schedule=cosine")
        else:
            arguments.overrides.append(_quoted(_own(word)))
    if "sweeper=optuna" in arguments.overrides:
        arguments.overrides = [re.sub(r"^(\+*)hydra\.sweeper\.", r"\1sweeper.", word) for word in arguments.overrides]
    return arguments


def _own(word: str) -> str:
    """`hydra/launcher=slurm` as the group `launcher` that it means, which the frozen config keeps; so for `sweeper`.

    Launchers and sweepers of Hydra's plugins are left to Hydra.
    """
    group, _, choice = word.partition("=")
    name = group.removeprefix("hydra/")
    return f"{name}={choice}" if group != name and choice in groups().get(name, ()) else word


def as_dict(overrides: list[str]) -> dict[str, str]:
    """`KEY=VALUE` words by their keys."""
    return {key: value for key, _, value in (word.partition("=") for word in overrides)}


def _quoted(word: str) -> str:
    """`KEY=PATH` as Hydra reads it: the names of run directories hold `=` and `,`."""
    key, _, value = word.partition("=")
    special = set(value) & set(",= ") and value[:1] not in ("'", '"', "[", "{")
    return f"{key}='{value}'" if special and Path(value).expanduser().exists() else word


def compose_config(
    name: str, overrides: list[str], config_dirs: list[str], prepare: Callable[[DictConfig], None] | None = None
) -> dict[str, Any]:
    """A resolved and checked config.

    Arguments:
        name: the primary config, such as `train`.
        overrides: what was typed.
        config_dirs: the user's own config folders.
        prepare: changes the composed config before it is resolved.

    Returns:
        Plain dicts, lists and values.

    Raises:
        DiffxError: for every mistake, in one sentence.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose(name, overrides=[*_searchpath(config_dirs), *overrides], return_hydra_config=True)
        OmegaConf.set_struct(config, False)
        chosen = config.pop("hydra").runtime.choices
        # by these names tables tell arms apart; of a trained run's parts the name they had there
        before = config.get("choices") or {}
        config.choices = {
            group: before.get(group, choice) if choice == "run" else choice
            for group, choice in {**before, **chosen}.items()
            if not group.startswith("hydra")
        }
        if prepare is not None:
            prepare(config)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise DiffxError(explain(error, overrides, name, config_dirs)) from error
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    check_types(config)
    return config


def explain(error: Exception, overrides: list[str], name: str, config_dirs: list[str]) -> str:
    """One sentence for what Hydra and OmegaConf say in many."""
    text = str(error)
    known = _all_groups(config_dirs)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': write KEY=VALUE, and quote values with spaces, commas or brackets"
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = getattr(error, "full_key", None) or text.split(":")[-1].strip()
        return f"{key} has no default; set {key}=VALUE"
    if isinstance(error, InterpolationResolutionError):
        return f"cannot resolve {getattr(error, 'full_key', None) or 'a value'}: {text.splitlines()[0]}"
    if isinstance(error, MissingConfigException):
        found = re.search(r"'([\w./-]+)/([^/']+)'", text)
        if found and found.group(1) in known:
            group, choice = found.groups()
            choices = known[group]
            return f"there is no {group}={choice}{nearest(choice, choices)}; choose {_either(choices)}"
        if found and (override := next((o for o in overrides if o.startswith(found.group(1) + "=")), None)):
            return f"cannot find the config for '{override}'; give the folder of your YAML files by --config-dir"
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        return _unknown_key(missing.group(1), name, known, overrides)
    return " ".join(text.split())


def _unknown_key(key: str, name: str, known: dict[str, list[str]], overrides: list[str]) -> str:
    keys = [*known] if name == "train" else []
    chosen = [override for override in overrides if override.partition("=")[0] in known]
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            keys += _keys(OmegaConf.to_container(compose(name, chosen), resolve=False))
    except HydraException:
        pass
    head, _, _ = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == head and k != key] if head else []
    hint = nearest(key, keys)
    remedy = f"; {head} has {', '.join(k.rpartition('.')[2] for k in siblings)}" if siblings and not hint else ""
    where = "diffx train --cfg prints all keys" if name == "train" else "--help lists them"
    return f"there is no key '{key}'{hint}{remedy or f'; {where}'}"


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not isinstance(config, dict):
        return []
    below = [_keys(value, f"{prefix}{key}.") for key, value in config.items()]
    return [f"{prefix}{key}" for key in config if not str(key).startswith("_")] + [k for keys in below for k in keys]


def _all_groups(config_dirs: list[str]) -> dict[str, list[str]]:
    known = groups()
    for folder in config_dirs:
        for file in Path(folder).glob("*/*.yaml"):
            known.setdefault(file.parent.name, []).append(file.stem)
    return known


def _either(choices: list[str]) -> str:
    return ", ".join(choices[:-1]) + (" or " if len(choices) > 1 else "") + choices[-1]


def refuse_sweep(overrides: list[str]) -> None:
    """Refuses several values for one key where `-m` was forgotten.

    Raises:
        DiffxError: naming the override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return  # composing says it better
    for override in parsed:
        if override.is_sweep_override():
            raise DiffxError(f"'{override.input_line}' names several values; add -m to run each of them")


def seeds_first(overrides: list[str]) -> list[str]:
    """Overrides in the order in which a sweep's last axis runs fastest and its seeds slowest.

    So all arms of the first seed come first, and can be compared while the others run.
    """
    return sorted(overrides, key=lambda word: not word.startswith("seed="))


def sweep_points(overrides: list[str], name: str, arguments: Arguments) -> list[list[str]]:
    """The overrides of every point of a sweep, without Hydra's own.

    Raises:
        DiffxError: if an override cannot be read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(seeds_first(overrides))
        own = [o for o in parsed if not o.key_or_group.startswith("hydra")]
        return BasicSweeper.split_arguments(own, None)[0]
    except HydraException as error:
        raise DiffxError(explain(error, overrides, name, arguments.config_dirs)) from error


def multirun(
    name: str,
    check: Callable[[list[str]], dict[str, Any]],
    task: Callable[[list[str]], int],
    arguments: Arguments,
) -> int:
    """Every point of a sweep, by Hydra's sweeper and launcher.

    Arguments:
        name: the primary config.
        check: makes the config of a point, given by its overrides, and raises if it cannot work; called for all points
            before the first starts.
        task: runs one point, given by its overrides, and returns its exit code.
        arguments: what was typed.

    Returns:
        0 if every point succeeded, otherwise 2; 128 + n if signal n has stopped parallel processes.

    Raises:
        DiffxError: if a point cannot be composed.
    """
    points = sweep_points(arguments.overrides, name, arguments)
    configs = [check(point) for point in points]
    total = len(points)

    def one(config: DictConfig) -> int:
        hydra = HydraConfig.get()
        point = list(hydra.overrides.task)
        label = f"[{hydra.job.num + 1}/{total}]"

        def run() -> int:
            print(f"{label} {' '.join(point)}" if parallel is None else " ".join(point), flush=True)
            try:
                return task(point)
            except DiffxError as error:
                print(f"diffx: {error}", file=sys.stderr)
                return 2

        if parallel is not None:
            return parallel.worker(label, run)
        if (code := run()) >= 128:
            raise KeyboardInterrupt
        return code

    version.setbase("1.3")
    GlobalHydra.instance().clear()
    batches: Any = None
    with tempfile.TemporaryDirectory() as sweep_dir:
        parallel = Parallel.of(arguments.overrides, configs, sweep_dir)
        hydra = Hydra.create_main_hydra2("diffx", create_config_search_path(str(config_dir())))
        quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null"]
        # another launcher's jobs may run on other machines, and look for its files
        plugin = parallel is None and any(o.startswith("hydra/launcher=") for o in arguments.overrides)
        with parallel.forwarding() if parallel else nullcontext():
            batches = hydra.multirun(
                config_name=name,
                task_function=one,
                overrides=[
                    *_searchpath(arguments.config_dirs),
                    *quiet,
                    *([] if plugin else [f"hydra.sweep.dir={sweep_dir}"]),
                    "hydra.sweeper.params=null",  # they are among the overrides already
                    *seeds_first(arguments.overrides),
                    *(parallel.overrides if parallel else []),
                ],
                with_log_configuration=False,
            )
        GlobalHydra.instance().clear()
        if parallel and (number := parallel.stopped) is not None:
            return 128 + number
    return 2 if any(job.return_value for batch in batches or [] for job in batch) else 0


def _searchpath(config_dirs: list[str]) -> list[str]:
    return [f"hydra.searchpath=[{','.join('file://' + folder for folder in config_dirs)}]"] if config_dirs else []
