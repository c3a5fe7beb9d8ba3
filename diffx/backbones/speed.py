"""Switches that make a network faster or smaller in memory and leave what it computes as it is.

They act in place and leave the keys of the state dict alone, so that checkpoints written with a switch load without it.

Blocks that are alike, as a transformer's, are compiled one by one: `torch.compile` then makes one graph of one block
and uses it for all; compiling the whole network took 2.5 times as long (DiT-S/2, CPU). Of a U-Net hardly two blocks are
alike, and it is compiled as a whole. So is any network for CUDA graphs ("reduce-overhead", "max-autotune"), which are
recorded once for each set of weights they read.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from diffx.utils import DiffxError

_COMPILE = [False, True, "reduce-overhead", "max-autotune"]

# what takes most of the time for the memory of its result: matrix products, convolutions, attention on every device
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def speed_up(
    backbone: nn.Module,
    *,
    compile: bool | str = False,
    channels_last: bool = False,
    activation_checkpointing: str = "none",
) -> None:
    """Applies the switches to a network, in place and with the same keys in its state dict; before its first call.

    Arguments:
        backbone: the network; one without `Backbone.parts` is taken as a single part.
        compile: whether to compile it with `torch.compile`, or the mode, "reduce-overhead" or "max-autotune". One graph
            for each batch size, for training and for evaluation; PyTorch keeps 8, later ones run uncompiled.
        channels_last: whether convolutions compute in `[B, H, W, C]` order; without effect on a network without them.
        activation_checkpointing: what is recomputed in the backward pass of training instead of being kept (Chen et
            al., *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174): "none", "full" for all within each
            part of the network, or "selective" for all but matrix products, convolutions and attention.

    Raises:
        DiffxError: for a switch that is set to something else.
    """
    if compile not in _COMPILE:
        raise DiffxError(f"trainer.compile is {compile}; choose false, true, reduce-overhead or max-autotune")
    if activation_checkpointing not in _FORWARD:
        raise DiffxError(
            f"trainer.activation_checkpointing is {activation_checkpointing}; choose {', '.join(_FORWARD)}"
        )
    parts = getattr(backbone, "parts", ()) or (backbone,)
    if channels_last and any(p.ndim == 4 for p in backbone.parameters()):
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        backbone.register_forward_pre_hook(_to_channels_last)
    if forward := _FORWARD[activation_checkpointing]:
        for part in parts:
            part.forward = MethodType(forward, part)
    if compile:
        # static shapes: a graph for any batch size is slower
        mode = compile if isinstance(compile, str) else None
        for part in parts if mode is None and _alike(parts) else [backbone]:
            part.compile(dynamic=False, mode=mode)
        if mode is not None:
            backbone.register_forward_pre_hook(_new_generation)


def _alike(parts: tuple[nn.Module, ...]) -> bool:
    """Whether all parts have the same layers, so that one graph serves them all."""
    return len({(type(part), tuple((k, p.shape) for k, p in part.named_parameters())) for part in parts}) == 1


def _to_channels_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].contiguous(memory_format=torch.channels_last), *args[1:]


def _new_generation(*_: Any) -> None:
    """Lets CUDA graphs write over the result of the call before, which a denoiser has made its estimate of."""
    if not torch.is_grad_enabled():  # else a backward pass may still need it
        torch.compiler.cudagraph_mark_step_begin()


# Methods, put before those of the class: a copy of the network gets its own, and `torch.compile` sees the same function
# on all parts.


def _recomputed(part: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    if part.training and torch.is_grad_enabled():
        return checkpoint(type(part).forward, part, *args, use_reentrant=False, **kwargs)
    return type(part).forward(part, *args, **kwargs)


def _recomputed_in_part(part: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    if part.training and torch.is_grad_enabled():
        contexts = partial(create_selective_checkpoint_contexts, _KEPT)
        return checkpoint(type(part).forward, part, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return type(part).forward(part, *args, **kwargs)


_FORWARD = {"none": None, "full": _recomputed, "selective": _recomputed_in_part}
