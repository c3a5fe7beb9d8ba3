"""The floating point operations of training."""

import copy
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffx.training.module import DiffusionModule


def training_flops(module: DiffusionModule, batch: dict[str, Tensor]) -> float:
    """Floating point operations per image of a training step, forward and backward.

    A multiplication and its addition are two. Counted are matrix products, convolutions and attention, as PyTorch's
    counter does, of the network without compilation. Weights, random state and what an objective learns by itself
    stay as they are.

    Arguments:
        module: what is trained; its gradients are cleared.
        batch: a training batch, of which two images are taken.
    """
    few = {name: value[:2].to(module.device) for name, value in batch.items()}
    counter = FlopCounterMode(display=False)
    # its hooks, which would tell the modules apart, do not survive the derivative of a learned schedule
    counter.mod_tracker = _OneModule()  # pyright: ignore[reportAttributeAccessIssue]
    objective, seen = module.objective, module.first_nonfinite
    module.objective = copy.deepcopy(objective)  # time samplers learn from the losses they see
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            counter,
        ):
            module.training_step(few, 0)["loss"].backward()
    finally:
        module.objective, module.first_nonfinite = objective, seen
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(few["index"])


class _OneModule:
    """Takes all modules for one."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass
