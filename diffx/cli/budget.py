"""Equal budgets: how many steps a budget of images or floating point operations is."""

from typing import Any

from omegaconf import DictConfig

from diffx.experiment import fingerprint, identity
from diffx.utils import DiffxError

BUDGETS = ("max_images", "max_flops")
"""Budgets that stand for a number of steps."""

_COUNTED: dict[str, float] = {}
"""Operations per image of the networks that have been counted: the arms of a sweep share them."""

_FREE = {"name", "optimizer", "lr_schedule", "ema"}


def set_steps(config: DictConfig) -> None:
    """Turns a budget of images into one of steps, before anything is interpolated from it.

    Raises:
        DiffxError: if there is no budget, or more than one.
    """
    training = config.training
    given = [key for key in BUDGETS if training[key] is not None]
    if len(given) > 1:
        raise DiffxError(
            f"training.{given[0]} and training.{given[1]} are two budgets of which only one can be met; leave one out"
        )
    if training.max_images is not None:
        if not isinstance(training.max_images, int) or not isinstance(config.data.batch_size, int):
            raise DiffxError("training.max_images and data.batch_size must be whole numbers")
        training.max_steps = max(1, training.max_images // config.data.batch_size)
    if training.max_steps is None and training.max_flops is None:
        raise DiffxError(
            "nothing says how long to train; set training.max_steps=…, training.max_images=… or training.max_flops=…"
        )
    if training.max_steps is None:
        training.max_steps = 1  # until the operations have been counted


def steps_of_flops(config: dict[str, Any]) -> int:
    """The steps that training.max_flops pays for.

    Arguments:
        config: a resolved config.

    Raises:
        DiffxError: if it is less than a step, or the arm cannot be built.
    """
    from diffx.cli.build import build  # not before the command line has been found good
    from diffx.training.flops import training_flops

    key = fingerprint({key: value for key, value in identity(config).items() if key not in _FREE | {"training"}})
    if key not in _COUNTED:
        arm = build(config)
        arm.source.prepare()
        _COUNTED[key] = training_flops(arm.module, next(iter(arm.source.train_loader(config["seed"]))))
    step = _COUNTED[key] * config["data"]["batch_size"]
    steps = int(config["training"]["max_flops"] // step)
    if steps < 1:
        raise DiffxError(
            f"training.max_flops={config['training']['max_flops']:g} is less than one step, which takes {step:.4g}; "
            "give a larger budget"
        )
    return steps
