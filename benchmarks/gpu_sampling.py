"""Sampling with guidance on a device, against the bare forward passes that it cannot do without."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_training import Device, Model, float32_products, synchronisations
from torch import Tensor

from diffx.autoencoders import Pixels
from diffx.backbones import speed_up
from diffx.conditioning import LabelConditioner
from diffx.denoisers import Preconditioned
from diffx.discretizations import LogSNR
from diffx.generate import Generator
from diffx.guidance import ClassifierFree
from diffx.parameterizations import V
from diffx.samplers import DDIM, DPMSolverPP2M, Sampler
from diffx.schedules import Cosine

STEPS, SCALE = 50, 1.5
SAMPLERS: dict[str, Sampler] = {"ddim": DDIM(), "dpmpp_2m": DPMSolverPP2M()}
MODES: tuple[bool | str, ...] = (False, True, "reduce-overhead")


def sample(name: str, model: Model, mode: bool | str, batch: int, device: Device, quick: bool) -> list[dict[str, Any]]:
    """Images per second in bf16 of the bare network and through each sampler, in turn.

    Arguments:
        name: the config of the network.
        model: its shape.
        mode: as `trainer.compile`.
        batch: images at once; guidance makes twice as many of them for the network.
        device: where.
        quick: few steps of a small network.
    """
    device.tidy()
    steps = 3 if quick else STEPS
    network = model.network(name, device.kind, quick).eval().requires_grad_(False)
    speed_up(network, compile=mode)
    conditioner = LabelConditioner(model.classes)
    denoiser = ClassifierFree(Preconditioned(network, Cosine(), V()).to(device.kind), conditioner, SCALE)
    index = torch.arange(batch, device=device.kind)
    shape = model.shape(quick)

    def bare() -> Tensor:
        x = torch.randn(2 * batch, *shape, device=device.kind)
        logsnr = torch.zeros(2 * batch, device=device.kind)
        label = torch.cat([index % model.classes, torch.full_like(index, model.classes)])
        for _ in range(steps):
            with torch.autocast(device.kind, torch.bfloat16):
                x = network(x, logsnr, label).float()
        return x

    def through(sampler: Sampler) -> Callable[[], Any]:
        generator = Generator(
            denoiser, sampler, LogSNR(), steps, Pixels(), conditioner, shape,
            num_classes=model.classes, precision="bf16-mixed",
        )  # fmt: skip
        return lambda: generator(index)

    contenders = {"the network alone": bare} | {each: through(SAMPLERS[each]) for each in SAMPLERS}
    with torch.no_grad(), float32_products(True):
        return _measure(contenders, mode, batch, steps, device, quick)


def _measure(
    contenders: dict[str, Callable[[], Any]], mode: bool | str, batch: int, steps: int, device: Device, quick: bool
) -> list[dict[str, Any]]:
    places: dict[str, list[str]] = {}
    for name, contender in contenders.items():
        for _ in range(3):  # compiling, and what a CUDA graph records
            contender()
        with synchronisations() as found:
            device.watch(True)
            contender()
            device.watch(False)
        places[name] = found
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 if quick else 5):
        for name, contender in contenders.items():
            started = device.clock()
            contender()
            seconds[name].append(device.clock() - started)
    reference = next(iter(seconds.values()))
    return [
        {
            "compile": mode,
            "what": name,
            "batch": batch,
            "images_per_second": batch / statistics.median(times),
            "share_of_network_alone": statistics.median(a / b for a, b in zip(reference, times, strict=True)),
            "synchronisations_per_step": len(places[name]) / steps,
            "synchronised_at": sorted(set(places[name])),
        }
        for name, times in seconds.items()
    ]
