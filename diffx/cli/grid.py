"""A sweep in two stages: what is trained, and how each trained model is then sampled."""

from collections.abc import Sequence
from dataclasses import replace

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from diffx.cli.compose import Arguments, explain, sweep_points
from diffx.cli.paths import config_dir
from diffx.experiment.identity import INFERENCE
from diffx.utils import DiffxError

_AT_THE_END = {"num_samples", "seed", "reference"}
"""Keys of `evaluation` that an evaluation at the end can have its own values of."""


def two_stages(arguments: Arguments) -> Arguments:
    """The same sweep over models alone, each of which is evaluated at every point of the axes that leave it as it is.

    3 values of `schedule` and 4 of `sampler` train 3 models. The axes may stand in the experiment's file, as
    `hydra.sweeper.params`, where the command line does not name them.

    Arguments:
        arguments: what was typed, with `-m`.

    Returns:
        Overrides in which the axes of sampling have become `evaluation.final`, their first point being the run's own.

    Raises:
        DiffxError: if an override cannot be read.
    """
    overrides = with_params(arguments)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise DiffxError(explain(error, overrides, "train", arguments.config_dirs)) from error
    asking = [o.input_line or "" for o in parsed if o.is_sweep_override() and _asks(o.key_or_group)]
    if not asking:
        return replace(arguments, overrides=overrides)
    rest = [word for word in overrides if word not in asking]
    points = sweep_points(asking, "train", arguments)
    final = ",".join(_text(" ".join(point)) for point in points)
    return replace(arguments, overrides=[*rest, *points[0], f"evaluation.final=[{final}]"])


def with_params(arguments: Arguments) -> list[str]:
    """What was typed, and the axes that the experiment's file adds.

    Arguments:
        arguments: what was typed.
    """
    fixed = [word for word in arguments.overrides if word.startswith("experiment=") and "," not in word]
    where = [f"hydra.searchpath=[{','.join('file://' + f for f in arguments.config_dirs)}]"] if fixed else []
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("train", [*(where if arguments.config_dirs else []), *fixed], return_hydra_config=True)
    except HydraException:
        return arguments.overrides  # composing the points says it
    params: DictConfig | None = composed.hydra.sweeper.get("params")
    typed = {word.partition("=")[0].lstrip("+~") for word in arguments.overrides}
    axes = [f"{key}={value}" for key, value in (params or {}).items() if str(key).lstrip("+") not in typed]
    return [*arguments.overrides, *axes]


def _asks(key: str) -> bool:
    """Whether an axis leaves the trained model as it is."""
    head, _, rest = key.partition("@")[0].partition(".")
    return rest in _AT_THE_END if head == "evaluation" else head in INFERENCE


def _text(words: str) -> str:
    """A string as Hydra reads it within a list."""
    return "'" + words.replace("\\", "\\\\").replace("'", "\\'") + "'"


def without(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """Overrides, less those that others speak of again."""
    again = {word.partition("=")[0] for word in more}
    return [word for word in overrides if word.partition("=")[0] not in again]
