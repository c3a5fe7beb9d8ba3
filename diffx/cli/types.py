"""Checks values against the annotations of the constructors they go to, before anything is built."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union

from diffx.utils import DiffxError, nearest

TOP_LEVEL: dict[str, Any] = {
    "name": str,
    "seed": int,
    "training.max_steps": int | None,
    "training.max_images": int | None,
    "training.max_flops": float | None,
    "training.max_device_seconds": float | None,
    "training.precision": str,
    "training.gradient_clip_val": float | None,
    "training.nonfinite": Literal["stop", "skip"],
    "evaluation.every_n_steps": int,
    "evaluation.interim_samples": int,
    "evaluation.num_samples": int,
    "evaluation.batch_size": int,
    "evaluation.precision": Literal["32-true", "bf16-mixed", "16-mixed"],
    "evaluation.reference": str,
    "evaluation.interim": list[str],
    "evaluation.final": list[str],
    "evaluation.save_every": int,
    "evaluation.likelihood_images": int,
    "weights": str,
    "evaluation.per_class": int,
    "evaluation.seed": int,
    "checkpoint.every_n_steps": int,
    "checkpoint.keep_last": int,
    "checkpoint.keep_every_n_steps": int | None,
    "checkpoint.monitor": str | None,
    "checkpoint.mode": Literal["min", "max"],
    "log_every_n_steps": int,
    "progress_bar": bool,
    "runs_dir": str,
    "sampler.steps": int,
    "trainer.accelerator": str,
    "trainer.devices": int,
    "trainer.num_nodes": int,
    "trainer.strategy": str,
    "trainer.accumulate_grad_batches": int,
    "trainer.compile": bool | Literal["reduce-overhead", "max-autotune"],
    "trainer.precision": str,
    "trainer.channels_last": bool,
    "trainer.activation_checkpointing": Literal["none", "full", "selective"],
    "n": int,
    "labels": list[int] | None,
    "out": str | None,
    "batch_size": int,
    "device": str,
    "devices": int,
    "images": str | None,
    "repeat": str | None,
    "trajectory": bool,
    "min_accuracy": float,
    "epochs": int | None,
    "iterations": int,
    "image_size": int | None,
    "channels": int | None,
    "filter": str,
    "format": str | None,
    "quality": int,
    "upscale": bool,
    "shard_size": int | str,
    "shuffle": bool,
    "keys": str,
    "classes": bool,
    "num_classes": int | None,
    "image_key": str | None,
    "label_key": str | None,
    "text_key": str | None,
    "broken": Literal["stop", "skip"],
    "workers": int | None,
    "checksums": bool,
    "dtype": Literal["float16", "float32"],
    "flip": bool,
    "rank": int | None,
    "world_size": int | None,
    "training.kl_weight": float,
    "training.loss": Literal["l1", "mse"],
}
"""The types of the keys that no constructor takes."""

POSITIVE = {
    "training.max_steps",
    "training.max_images",
    "training.max_flops",
    "training.max_device_seconds",
    "evaluation.batch_size",
    "evaluation.save_every",
    "evaluation.likelihood_images",
    "evaluation.per_class",
    "checkpoint.every_n_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every_n_steps",
    "log_every_n_steps",
    "sampler.steps",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "n",
    "devices",
    "batch_size",
    "epochs",
    "iterations",
    "image_size",
    "num_classes",
    "workers",
    "world_size",
}
"""Those of them that count something."""

EXTRA = {"sampler": {"steps"}}
"""Keys beside `_target_` that are read by diffx and not passed to the constructor."""


def check_types(config: dict[str, Any]) -> None:
    """Walks through a resolved config.

    Raises:
        DiffxError: for the first value of a wrong type, unknown argument or `_target_` that cannot be imported.
    """
    for key, expected in TOP_LEVEL.items():
        found, value = _get(config, key)
        if found and not _fits(value, expected):
            raise DiffxError(f"{key} must be {_name(expected)}, not {value!r}; set {key}=VALUE")
        if found and key in POSITIVE and value is not None and value < 1:
            raise DiffxError(f"{key} must be at least 1, not {value!r}; set {key}=VALUE")
    for group, node in config.items():
        if isinstance(node, dict):
            _check_node(group, node)


def locate_target(target: str, where: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names.

    Raises:
        DiffxError: if there is none, naming the config key.
    """
    parts = target.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if error.name is not None and not ".".join(parts[:n]).startswith(error.name):
                raise DiffxError(f"{where}._target_={target} needs the package '{error.name}'; install it") from error
            continue
        try:
            for part in parts[n:]:
                found = getattr(found, part)
        except AttributeError as error:
            hint = nearest(parts[-1], [name for name in dir(found) if not name.startswith("_")])
            raise DiffxError(f"{where}._target_={target}: '{parts[n - 1]}' has no '{parts[-1]}'{hint}") from error
        assert callable(found)
        return found
    raise DiffxError(f"{where}._target_={target} cannot be imported; correct it, or call diffx where your package lies")


def _check_node(where: str, node: dict[str, Any]) -> None:
    if "_target_" in node:
        _check_arguments(where, node, locate_target(str(node["_target_"]), where))
    for key, value in node.items():
        if isinstance(value, dict):
            _check_node(f"{where}.{key}", value)


def _check_arguments(where: str, node: dict[str, Any], target: Callable[..., Any]) -> None:
    parameters = _parameters(target)
    if parameters is None:
        return
    hints = _hints(target)
    for key, value in node.items():
        if key.startswith("_") or key in EXTRA.get(where.rpartition(".")[2], ()):
            continue
        if key not in parameters:
            hint = nearest(key, parameters)
            raise DiffxError(
                f"{where}.{key} is no argument of {node['_target_']}{hint}; it has {', '.join(parameters)}"
            )
        if key in hints and not isinstance(value, dict) and not _fits(value, hints[key]):
            raise DiffxError(f"{where}.{key} must be {_name(hints[key])}, not {value!r}; set {where}.{key}=VALUE")


def _parameters(target: Callable[..., Any]) -> list[str] | None:
    """Argument names along the chain of constructors that pass **keywords on; None where they cannot be told."""
    names: list[str] = []
    for function in _constructors(target):
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return None
        kinds = [p.kind for p in signature.parameters.values()]
        names += [
            name
            for name, p in signature.parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in ("self", "cls")
        ]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return names
    return None


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for function in reversed(_constructors(target)):
        try:
            hints |= typing.get_type_hints(function)
        except (NameError, TypeError):  # annotations of somebody else that do not resolve are not checked
            continue
    return hints


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not inspect.isclass(target):
        return [target]
    return [base.__dict__["__init__"] for base in target.__mro__ if "__init__" in base.__dict__ and base is not object]


def _get(config: dict[str, Any], key: str) -> tuple[bool, Any]:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _fits(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or isinstance(expected, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if expected is None or expected is type(None):
        return value is None
    if expected is bool:
        return isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is str:
        return isinstance(value, str)
    if origin in (list, tuple, set, Sequence) or expected in (list, tuple):
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value if arguments)
    # objects built from nested nodes, tensors and the like are the constructor's business
    return True


def _name(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if expected in names:
        return names[expected]
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, tuple, Sequence):
        return f"a list of {_name(arguments[0]).removeprefix('a ')}s" if arguments else "a list"
    return getattr(expected, "__name__", str(expected))
