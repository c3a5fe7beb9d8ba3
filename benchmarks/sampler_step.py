"""A sampler's own work per step: the denoiser returns one and the same tensor."""

from collections.abc import Callable
from typing import Any

import bare_samplers
import torch
from bare_samplers import Loop
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from measure import Case, Clock, microseconds
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.discretizations import Integer
from diffx.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Sampler
from diffx.schedules import NoiseLevel, Tabulated

SHAPES = ((1, 3, 32, 32), (16, 3, 32, 32))
STEPS = 50
T = 1000
COMMON: dict[str, Any] = {"num_train_timesteps": T, "prediction_type": "sample", "timestep_spacing": "trailing"}
UNCLIPPED: dict[str, Any] = {**COMMON, "clip_sample": False}

SOLVERS: dict[str, tuple[Sampler, Callable[[list[NoiseLevel]], Loop], Any]] = {
    "DDIM": (DDIM(), bare_samplers.ddim, DDIMScheduler(**UNCLIPPED)),
    "Euler": (Euler(), bare_samplers.euler, EulerDiscreteScheduler(**COMMON)),
    "Heun": (Heun(), bare_samplers.heun, HeunDiscreteScheduler(**COMMON)),
    "DPM++(2M)": (DPMSolverPP2M(), bare_samplers.dpmpp_2m, DPMSolverMultistepScheduler(**COMMON)),
    "DDPM": (DDPM(), bare_samplers.ddpm, DDPMScheduler(**UNCLIPPED)),
}


class Fixed(Denoiser):
    """x̂, whatever is asked."""

    def __init__(self, x_hat: Tensor) -> None:
        super().__init__()
        self.x_hat = x_hat
        self.schedule = Tabulated.ddpm(T)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.x_hat


def cases(quick: bool, clock: Clock) -> list[Case]:
    """One case per shape `[B, C, H, W]` and solver."""
    return [_case(name, shape, quick, clock) for shape in SHAPES for name in SOLVERS]


def _case(name: str, shape: tuple[int, ...], quick: bool, clock: Clock) -> Case:
    sampler, bare, scheduler = SOLVERS[name]
    x, x_hat = torch.randn(2, *shape)
    denoiser = Fixed(x_hat)
    times = Integer(T)(denoiser.schedule, STEPS)
    loop = bare(denoiser.schedule.levels(times.float()))

    @torch.no_grad()
    def through_bare() -> Tensor:
        torch.manual_seed(0)
        return loop(denoiser, x)

    @torch.no_grad()
    def through_diffx() -> Tensor:
        torch.manual_seed(0)
        # diffx evaluates the schedule within the call, once for all steps; the others have done so before
        return sampler(denoiser, x, times, noise=lambda *_: torch.randn_like(x))

    def reset() -> None:
        scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True  # otherwise Euler warns at every step

    @torch.no_grad()
    def through_diffusers() -> Tensor:
        torch.manual_seed(0)
        x_t = x
        for i in scheduler.timesteps:
            x_t = scheduler.step(denoiser(x_t, i), i, x_t, return_dict=False)[0]
        return x_t

    torch.testing.assert_close(through_diffx(), through_bare(), rtol=1e-4, atol=1e-4)
    calls = max(1, 4 // shape[0])
    return Case(
        "sampler, µs per step",
        f"{name} {list(shape)}",
        {
            "bare loop": microseconds(clock, through_bare, calls, STEPS),
            "diffx": microseconds(clock, through_diffx, calls, STEPS),
            "diffusers": microseconds(clock, through_diffusers, calls, STEPS, reset),
        },
        rounds=3 if quick else 21,
    )
