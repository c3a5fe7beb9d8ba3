"""A sampler's own work per step: the denoiser returns one and the same tensor."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import azula.denoise
import azula.noise
import azula.sample
import bare_samplers as bare
import diffusers
import torch
from bare_samplers import Levels, Loop
from measure import Case, Clock, microseconds
from torch import Tensor

from diffx.denoisers import Denoiser
from diffx.discretizations import Integer
from diffx.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    PNDM,
    DEISLogRho,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    EDMHeun,
    Euler,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    Sampler,
    UniPC,
)
from diffx.schedules import Schedule, Tabulated

SHAPES = ((1, 3, 32, 32), (16, 3, 32, 32))
STEPS = 50
T = 1000
COMMON: dict[str, Any] = {"num_train_timesteps": T, "prediction_type": "sample", "timestep_spacing": "trailing"}
UNCLIPPED: dict[str, Any] = {**COMMON, "clip_sample": False}
EPSILON: dict[str, Any] = {**COMMON, "prediction_type": "epsilon"}
"""For schedulers that take no estimate of x; what they are given makes no difference to the time."""


@dataclass
class Solver:
    """A sampler and those of the others that do the same.

    Arguments:
        sampler: diffx's.
        bare: makes the loop by hand, of a schedule and the levels of a grid.
        scheduler: diffusers', if any.
        own_steps: the scheduler's steps for one of diffx's, where it counts estimates on the way as steps.
        k_diffusion: the name of k-diffusion's function, if any, and its arguments.
        azula: azula's sampler, if any.
    """

    sampler: Sampler
    bare: Callable[[Schedule, Levels], Loop]
    scheduler: Any = None
    own_steps: int = 1
    k_diffusion: tuple[str, dict[str, Any]] | None = None
    azula: Callable[..., Any] | None = None


def _adams_bashforth(sampler: Any) -> Callable[[Schedule, Levels], Loop]:
    return partial(bare.adams_bashforth, sampler=sampler)


def _multistep(**settings: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(**COMMON, **settings)


def solvers() -> dict[str, Solver]:
    """All of diffx that take a fixed number of estimates per step, with what others have of the same."""
    ab = azula.sample
    return {
        "DDIM": Solver(DDIM(), bare.ddim, diffusers.DDIMScheduler(**UNCLIPPED), 1, ("euler", {}), ab.DDIMSampler),
        "Euler": Solver(Euler(), bare.euler, diffusers.EulerDiscreteScheduler(**COMMON), 1, None, ab.EulerSampler),
        "Euler ancestral": Solver(
            DDIM(1.0),
            partial(bare.ddim, eta=1.0),
            diffusers.EulerAncestralDiscreteScheduler(**EPSILON),
            k_diffusion=("euler_ancestral", {}),
            azula=partial(ab.DDIMSampler, eta=1.0),
        ),
        "Euler-Maruyama": Solver(EulerMaruyama(), bare.euler_maruyama, azula=ab.ItoSampler),
        "DDPM": Solver(DDPM(), bare.ddpm, diffusers.DDPMScheduler(**UNCLIPPED), azula=ab.DDPMSampler),
        "Heun": Solver(Heun(), bare.heun),
        "EDM": Solver(
            EDMHeun(), bare.edm, diffusers.HeunDiscreteScheduler(**COMMON), 1, ("heun", {}), ab.HeunSampler
        ),
        "EDM, stochastic": Solver(
            EDMHeun(40.0), partial(bare.edm, churn=40.0), k_diffusion=("heun", {"s_churn": 40.0})
        ),
        "DPM-Solver-2": Solver(
            DPMSolver2(), partial(bare.two_stage, of_eps=True), diffusers.KDPM2DiscreteScheduler(**EPSILON), 1,
            ("dpm_2", {}),
        ),
        "DPM-Solver-2, ancestral": Solver(
            DPMSolver2(eta=1.0), partial(bare.two_stage, of_eps=True, eta=1.0),
            diffusers.KDPM2AncestralDiscreteScheduler(**EPSILON), 1, ("dpm_2_ancestral", {}),
        ),
        "DPM-Solver-3": Solver(DPMSolver3(), bare.dpm_solver_3),
        "DPM++(2S)": Solver(
            DPMSolverPP2S(), partial(bare.two_stage, of_eps=False),
            diffusers.DPMSolverSinglestepScheduler(num_train_timesteps=T, prediction_type="sample"), 2,
            ("dpmpp_2s_ancestral", {"eta": 0.0}),
        ),
        "DPM++(2S), ancestral": Solver(
            DPMSolverPP2S(eta=1.0), partial(bare.two_stage, of_eps=False, eta=1.0),
            k_diffusion=("dpmpp_2s_ancestral", {}),
        ),
        "DPM++(2M)": Solver(
            DPMSolverPP2M(), bare.dpmpp_2m, _multistep(), 1, ("dpmpp_2m", {}), partial(ab.xEABSampler, order=2)
        ),
        "DPM++(2M), SDE": Solver(
            DPMSolverPP2M(1.0), partial(bare.dpmpp_2m, eta=1.0), _multistep(algorithm_type="sde-dpmsolver++"), 1,
            ("dpmpp_2m_sde", {}),
        ),
        "DPM++(3M)": Solver(
            DPMSolverPP3M(), bare.dpmpp_3m, _multistep(solver_order=3), 1, ("dpmpp_3m_sde", {"eta": 0.0}),
            partial(ab.xEABSampler, order=3),
        ),
        "DPM++(3M), SDE": Solver(
            DPMSolverPP3M(1.0), partial(bare.dpmpp_3m, eta=1.0), k_diffusion=("dpmpp_3m_sde", {})
        ),
        "DEIS": Solver(
            DEIS(), _adams_bashforth(DEIS()), diffusers.DEISMultistepScheduler(**COMMON, solver_order=3), 1, None,
            partial(ab.zEABSampler, order=3),
        ),
        "DEIS, log ρ": Solver(
            DEISLogRho(), _adams_bashforth(DEISLogRho()),
            diffusers.DEISMultistepScheduler(**COMMON, solver_order=3), 1, None, partial(ab.zEABSampler, order=3),
        ),
        "LMS": Solver(
            LMS(), _adams_bashforth(LMS()), diffusers.LMSDiscreteScheduler(**COMMON), 1, ("lms", {}),
            partial(ab.zABSampler, order=4),
        ),
        "PNDM": Solver(PNDM(), bare.pndm, diffusers.PNDMScheduler(num_train_timesteps=T)),
        "UniPC": Solver(
            UniPC(), bare.unipc, diffusers.UniPCMultistepScheduler(**COMMON, solver_order=3, solver_type="bh2")
        ),
        "predictor-corrector": Solver(PredictorCorrector(), bare.predictor_corrector, azula=ab.PCSampler),
    }  # fmt: skip


class Fixed(Denoiser):
    """x̂, whatever is asked."""

    def __init__(self, x_hat: Tensor) -> None:
        super().__init__()
        self.x_hat = x_hat
        self.schedule = Tabulated.ddpm(T)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.x_hat


class FixedOfAzula(azula.denoise.Denoiser):
    """x̂, as azula returns it."""

    def __init__(self, x_hat: Tensor) -> None:
        super().__init__()
        self.posterior = azula.denoise.DiracPosterior(x_hat)
        self.schedule = azula.noise.VPSchedule()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> azula.denoise.DiracPosterior:
        return self.posterior


def k_diffusion() -> Any:
    """Its samplers alone: the package itself imports CLIP, kornia and more, which no sampler needs."""
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        found = importlib.util.find_spec("k_diffusion")
        assert found is not None
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def cases(quick: bool, clock: Clock) -> Iterator[Case]:
    """One case per shape `[B, C, H, W]` and solver."""
    for shape in SHAPES:
        for name, solver in solvers().items():
            yield _case(name, solver, shape, quick, clock)


def _case(name: str, solver: Solver, shape: tuple[int, ...], quick: bool, clock: Clock) -> Case:
    x, x_hat = torch.randn(2, *shape)
    denoiser, sampler = Fixed(x_hat), solver.sampler
    times = Integer(T)(denoiser.schedule, STEPS)
    levels = denoiser.schedule.levels(times.float())
    state, loop = sampler.init(denoiser, levels), solver.bare(denoiser.schedule, levels)
    calls = max(1, 4 // shape[0])

    def noise(step: int, draw: int = 0) -> Tensor:
        return torch.randn_like(x)

    def through_bare() -> Tensor:
        return loop(denoiser, x)

    def through_diffx() -> Tensor:
        out = x
        for out in sampler.steps(denoiser, x, levels, state, noise=noise):  # noqa: B007
            pass
        return out

    def whole_call() -> Tensor:
        return sampler(denoiser, x, times, noise=noise)

    contenders = {"bare loop": through_bare, "diffx": through_diffx, "diffx, with its set-up": whole_call}
    if solver.k_diffusion is not None:
        contenders["k-diffusion"] = _through_k_diffusion(solver.k_diffusion, denoiser, x, levels)
    if solver.azula is not None:
        contenders["azula"] = partial(solver.azula(FixedOfAzula(x_hat), steps=STEPS, silent=True), x)
    runs = {key: microseconds(clock, _seeded(function), calls, STEPS) for key, function in contenders.items()}
    if solver.scheduler is not None:
        runs["diffusers"] = _through_diffusers(solver, denoiser, x, calls, clock)
    torch.testing.assert_close(_seeded(through_diffx)(), _seeded(through_bare)(), rtol=1e-4, atol=1e-4)
    if "k-diffusion" in contenders:
        # both end at x̂, up to the noise that one of them adds before
        torch.testing.assert_close(_seeded(contenders["k-diffusion"])(), _seeded(through_diffx)(), rtol=1e-3, atol=1e-3)
    return Case("sampler, µs per step", f"{name} {list(shape)}", runs, rounds=3 if quick else 11)


def _seeded(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        torch.manual_seed(0)
        return function()

    return run


def _through_k_diffusion(
    asked: tuple[str, dict[str, Any]], denoiser: Fixed, x: Tensor, levels: Levels
) -> Callable[[], Tensor]:
    """The same grid with α = 1: samples are x/α at σ/α."""
    name, arguments = asked
    function = getattr(k_diffusion(), f"sample_{name}")
    if "sde" in name or "ancestral" in name:
        arguments = {**arguments, "noise_sampler": lambda *_: torch.randn_like(x)}
    sigmas = torch.tensor([level.sigma / level.alpha for level in levels])
    return lambda: function(denoiser, x / levels[0].alpha, sigmas, disable=True, **arguments)


def _through_diffusers(solver: Solver, denoiser: Fixed, x: Tensor, calls: int, clock: Clock) -> Callable[[], float]:
    scheduler = solver.scheduler

    def reset() -> None:
        scheduler.set_timesteps(solver.own_steps * STEPS)
        scheduler.is_scale_input_called = True  # otherwise Euler warns at every step

    @torch.no_grad()
    def run() -> Tensor:
        torch.manual_seed(0)
        x_t = x
        for i in scheduler.timesteps:
            x_t = scheduler.step(denoiser(x_t, i), i, x_t, return_dict=False)[0]
        return x_t

    return microseconds(clock, run, calls, STEPS, reset)
