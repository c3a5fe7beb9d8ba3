"""The samplers against diffusers' schedulers: the same denoiser, time grid and noise give the same samples.

diffusers counts the steps of a table of T from 0, diffx puts step i at t = (i + 1)/T with the clean end at t = 0; the
"trailing" spacing is then the `Integer` grid. diffusers ends at ᾱ = 1 (`set_alpha_to_one`,
`final_sigmas_type="zero"`), as t = 0 does. Its tables are float32: where a scheduler computes in the sample's
precision, it is given diffx's table in float64, so that the formulas alone are compared, to eight digits. The
schedulers that know levels by σ/α are given diffx's grid, and compute in float32: 1e-5.
"""

import itertools

import pytest
import torch
from conftest import F64, build, mixture, no_noise
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete
from torch import nn

from diffx.denoisers import Preconditioned
from diffx.discretizations import Integer, Karras, LogSNR
from diffx.parameterizations import V
from diffx.samplers import (
    DDIM,
    DDPM,
    PNDM,
    DEISLogRho,
    DPMSolverPP2M,
    DPMSolverPP2S,
    EDMHeun,
    Euler,
    Heun,
    UniPC,
)
from diffx.schedules import EDM, Cosine, Flow, Tabulated, ZeroSNR
from diffx.utils import Keys

B = 6
TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
every_target = pytest.mark.parametrize("prediction_type", list(TARGETS))


def every_case(*steps):
    """All targets at the given numbers of steps, and one at the table's full 1000."""
    return pytest.mark.parametrize(
        ("steps", "prediction_type"), [*itertools.product(steps, TARGETS), (1000, "epsilon")]
    )


def start(n=B):
    return Keys(0, torch.arange(n)).normal("x", 2, dtype=F64)


def noise(step, draw=0):
    return Keys(0, torch.arange(B), step).normal("noise", 2, dtype=F64)


def exactly(scheduler, schedule):
    """The scheduler with diffx's table instead of its float32 one, and a check that it is the same table."""
    table = torch.exp(schedule.log_alpha_bar[1:])
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = table
    if hasattr(scheduler, "final_alpha_cumprod"):
        assert scheduler.final_alpha_cumprod == 1
    return scheduler


def network_output(denoiser, parameterization, x_t, t):
    """What a network would have given for the denoiser's x̂."""
    _, c_skip, c_out = parameterization(*denoiser.schedule(t))
    return (denoiser(x_t, t) - c_skip * x_t) / c_out


def through_diffusers(scheduler, denoiser, parameterization, x, **step):
    """diffusers' loop; `step` maps names to functions of the step's number."""
    for k, i in enumerate(scheduler.timesteps):
        t = (i.double() + 1) / 1000
        arguments = {name: value(k) for name, value in step.items()}
        x = scheduler.step(network_output(denoiser, parameterization, x, t), i, x, **arguments).prev_sample
    return x


def through_diffx(sampler, denoiser, x, steps):
    times = Integer(1000)(denoiser.schedule, steps)
    return sampler(denoiser, x, times, noise=noise)


def same_noise(monkeypatch, steps):
    """Makes diffusers' DDPM draw diffx's noise, and none in the last step.

    There x_0 is the mean (arXiv 2006.11239, Alg. 2, line 3). diffusers leaves the noise out only where the last step
    starts at its index 0, that is on the full grid; with `fixed_large`, a shorter one ends with √β·z on the image.
    """
    drawn = []

    def randn_tensor(shape, **kwargs):
        drawn.append(None)
        z = noise(len(drawn) - 1)
        assert z.shape == shape
        return z if len(drawn) < steps else torch.zeros_like(z)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", randn_tensor)


@pytest.mark.parametrize("steps", [7, 50, 300])
def test_the_grid_is_the_trailing_one(steps):
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = Integer(1000)(Tabulated.ddpm(), steps)
    torch.testing.assert_close((scheduler.timesteps.double() + 1) / 1000, times[:-1], rtol=0, atol=1e-12)


@every_case(7, 50)
@pytest.mark.parametrize(("variance_type", "v"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_ddpm(monkeypatch, steps, variance_type, v, prediction_type):
    denoiser = mixture(Tabulated.ddpm())
    scheduler = DDPMScheduler(
        variance_type=variance_type,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    exactly(scheduler, denoiser.schedule).set_timesteps(steps)
    same_noise(monkeypatch, steps)
    expected = through_diffusers(scheduler, denoiser, build("parameterization", TARGETS[prediction_type]), start())
    torch.testing.assert_close(through_diffx(DDPM(v), denoiser, start(), steps), expected, rtol=1e-8, atol=1e-8)


def test_ddpm_between_the_two_variances(monkeypatch):
    # IDDPM's interpolation, Eq. 15: diffusers' "learned_range" takes v from the network, as 2v − 1
    denoiser, v = mixture(Tabulated.ddpm()), 0.3
    scheduler = DDPMScheduler(
        variance_type="learned_range", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    exactly(scheduler, denoiser.schedule).set_timesteps(20)
    same_noise(monkeypatch, 20)
    x = start()
    for i in scheduler.timesteps:
        x_hat = denoiser(x, (i.double() + 1) / 1000)
        x = scheduler.step(torch.cat([x_hat, torch.full_like(x_hat, 2 * v - 1)], 1), i, x).prev_sample
    torch.testing.assert_close(through_diffx(DDPM(v), denoiser, start(), 20), x, rtol=1e-8, atol=1e-8)


@every_case(5, 50)  # divisors: diffusers' DDIM steps back by 1000 // steps
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(steps, eta, prediction_type):
    denoiser = mixture(Tabulated.ddpm())
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    exactly(scheduler, denoiser.schedule).set_timesteps(steps)
    parameterization = build("parameterization", TARGETS[prediction_type])
    noises = {"variance_noise": noise} if eta > 0 else {}
    expected = through_diffusers(scheduler, denoiser, parameterization, start(), eta=lambda k: eta, **noises)
    torch.testing.assert_close(through_diffx(DDIM(eta), denoiser, start(), steps), expected, rtol=1e-8, atol=1e-8)


@every_target
@pytest.mark.parametrize("steps", [1, 2, 10, 40])  # below and above 15, where `lower_order_final` makes a difference
def test_dpm_solver_pp_2m(steps, prediction_type):
    denoiser = mixture(Tabulated.ddpm())
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    exactly(scheduler, denoiser.schedule).set_timesteps(steps)
    parameterization = build("parameterization", TARGETS[prediction_type])
    expected = through_diffusers(scheduler, denoiser, parameterization, start())
    # it computes in float32, and turns its output into x̂ by float32 coefficients
    ours = through_diffx(DPMSolverPP2M(), denoiser, start(), steps)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_the_tables_of_diffusers_as_they_are():
    # no table exchanged: float32 throughout, and the difference is float32's
    denoiser = mixture(Tabulated.ddpm(), torch.float32)
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    x = start().float()
    expected = x
    for i in scheduler.timesteps:
        expected = scheduler.step(denoiser(expected, (i + 1) / 1000), i, expected).prev_sample
    ours = through_diffx(DDIM(), denoiser, x, 50)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 18])
@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(EDMEulerScheduler, Euler()), (EDMEulerScheduler, DDIM()), (EDMDPMSolverMultistepScheduler, DPMSolverPP2M())],
)
def test_edm(scheduler, sampler, steps):
    # these know EDM's preconditioning: the network's output goes in, so that c_skip and c_out are compared too
    denoiser, parameterization = mixture(EDM()), build("parameterization", "edm")
    scheduler = scheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(steps)
    times = Karras()(denoiser.schedule, steps)
    torch.testing.assert_close(scheduler.sigmas.double(), 80 * times, rtol=1e-5, atol=1e-9)
    x = expected = 80 * start()
    for k, i in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[k].double() / 80
        c_in = parameterization(torch.ones((), dtype=F64), 80 * t)[0]
        torch.testing.assert_close(scheduler.scale_model_input(expected, i), c_in * expected, rtol=1e-5, atol=1e-6)
        output = network_output(denoiser, parameterization, expected, t)
        expected = scheduler.step(output, i, expected).prev_sample
    ours = sampler(denoiser, x, times, noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [Heun(), EDMHeun()])
@pytest.mark.parametrize("steps", [4, 18])
def test_heun(steps, sampler):
    denoiser, parameterization = mixture(EDM()), build("parameterization", "x0")
    times = Karras()(denoiser.schedule, steps)
    scheduler = HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(steps)
    # each σ but the first and the last is visited twice, as predictor's end and as corrector's start
    sigmas = 80 * times
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    assert len(scheduler.timesteps) == 2 * steps - 1 == Heun().nfe(steps)
    x = expected = 80 * start()
    for i in scheduler.timesteps:
        if scheduler.step_index is None:
            scheduler.set_begin_index(0)
        sigma = scheduler.sigmas[scheduler.step_index or 0]
        output = network_output(denoiser, parameterization, expected, sigma / 80)
        expected = scheduler.step(output, i, expected).prev_sample
    ours = sampler(denoiser, x, times, noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [Euler(), DDIM()])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_flow_matching(sampler, steps):
    denoiser, parameterization = mixture(Flow()), build("parameterization", "flow")
    times = torch.linspace(1, 0, steps + 1, dtype=F64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas.double(), times, rtol=1e-6, atol=0)
    x = expected = start()
    for k, i in enumerate(scheduler.timesteps):
        output = network_output(denoiser, parameterization, expected, scheduler.sigmas[k].double())
        expected = scheduler.step(output, i, expected).prev_sample
    ours = sampler(denoiser, x, times, noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_velocity_is_diffusers_velocity():
    x, z = start(), Keys(1, torch.arange(B)).normal("z", 2, dtype=F64)
    schedule = Tabulated.ddpm()
    steps = torch.tensor([0, 100, 400, 700, 900, 999])
    scheduler = exactly(DDPMScheduler(), schedule)
    alpha, sigma = (c[:, None] for c in schedule((steps + 1).double() / 1000))
    torch.testing.assert_close(alpha * x + sigma * z, scheduler.add_noise(x, z, steps))
    _, c_skip, c_out = V()(alpha, sigma)
    target = (x - c_skip * (alpha * x + sigma * z)) / c_out
    torch.testing.assert_close(target, scheduler.get_velocity(x, z, steps), rtol=1e-9, atol=1e-9)


def test_a_preconditioned_network_goes_the_same_way():
    # the whole path, with a network: c_in, logSNR and all
    class Network(nn.Module):
        def forward(self, x, logsnr):
            return torch.tanh(x + 0.1 * logsnr[:, None])

    schedule = Tabulated.ddpm()
    denoiser = Preconditioned(Network(), schedule, build("parameterization", "eps"))
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    exactly(scheduler, schedule).set_timesteps(25)
    expected = start()
    for i in scheduler.timesteps:
        log_alpha_bar = schedule.log_alpha_bar[i + 1]
        logsnr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        expected = scheduler.step(Network()(expected, logsnr.expand(B)), i, expected).prev_sample
    torch.testing.assert_close(through_diffx(DDIM(), denoiser, start(), 25), expected, rtol=1e-8, atol=1e-8)


# ---- schedulers that know levels by σ/α ----

LAST = 0.002
"""The σ/α at which these grids end, so that multistep methods keep their order to the last step: at the clean end
diffusers lowers the orders of the last steps, diffx that of the very last only, which is x̂."""


def on_grid(scheduler, denoiser, times):
    """The scheduler with diffx's grid, as σ/α; its own is made first for what else it sets up."""
    scheduler.set_timesteps(len(times) - 1)
    alpha, sigma = denoiser.schedule(times)
    scheduler.sigmas = sigma / alpha
    # only looked up, never computed with
    scheduler.timesteps = torch.arange(len(times) - 1, 0, -1)
    scheduler.set_begin_index(0)
    return scheduler


def through_levels(scheduler, denoiser, x, times, **step):
    on_grid(scheduler, denoiser, times)
    for k, i in enumerate(scheduler.timesteps):
        arguments = {name: value(k) for name, value in step.items()}
        x = scheduler.step(denoiser(x, times[k]), i, x, **arguments).prev_sample
    return x


def vp(steps, discretization=None):
    """A variance-preserving denoiser, samples from N(0, I), and a grid that ends at `LAST`."""
    denoiser = mixture(Cosine())
    stop = denoiser.schedule.inverse(-2 * torch.tensor(LAST, dtype=F64).log()).item()
    return denoiser, start(), (discretization or LogSNR())(denoiser.schedule, steps, 0.98, stop)


MULTISTEP = {"prediction_type": "sample", "lower_order_final": False, "final_sigmas_type": "sigma_min"}
every_spacing = pytest.mark.parametrize("discretization", [LogSNR(), Karras()])


@every_spacing
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, b, steps, discretization):
    denoiser, x, times = vp(steps, discretization)
    # diffusers' order 1 has no predictor but DDIM's, as the paper's
    scheduler = UniPCMultistepScheduler(solver_order=order, solver_type=f"bh{b}", predict_x0=True, **MULTISTEP)
    expected = through_levels(scheduler, denoiser, x, times)
    ours = UniPC(order, b)(denoiser, x, times, noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@every_spacing
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, steps, discretization):
    denoiser, x, times = vp(steps, discretization)
    scheduler = DEISMultistepScheduler(solver_order=order, prediction_type="sample", lower_order_final=False)
    expected = through_levels(scheduler, denoiser, x, times)
    ours = DEISLogRho(order)(denoiser, x, times, noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@every_spacing
@pytest.mark.parametrize("steps", [4, 25])
def test_dpm_solver_pp_2m_sde(steps, discretization):
    denoiser, x, times = vp(steps, discretization)
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint", **MULTISTEP
    )
    expected = through_levels(scheduler, denoiser, x, times, variance_noise=noise)
    ours = DPMSolverPP2M(eta=1)(denoiser, x, times, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [2, 12])
def test_dpm_solver_pp_2s(steps):
    # diffusers counts the estimate on the way as a step of the grid: two of its steps are one of diffx's
    denoiser, x, fine = vp(2 * steps)
    scheduler = DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", **MULTISTEP
    )
    expected = through_levels(scheduler, denoiser, x, fine)
    assert scheduler.order_list == [1, 2] * steps
    ours = DPMSolverPP2S()(denoiser, x, fine[::2], noise=no_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [20, 50])
def test_pndm(steps):
    # the "leading" spacing, at which the middles of the first steps are whole numbers. The last step of diffusers,
    # to ᾱ = 1, is (x_t − σ_t·ε̂′)/α_t with the multistep ε̂′; diffx's is x̂
    denoiser, T = mixture(Tabulated.ddpm()), 1000
    scheduler = exactly(PNDMScheduler(timestep_spacing="leading", set_alpha_to_one=True), denoiser.schedule)
    scheduler.set_timesteps(steps)
    x, parameterization = start(), build("parameterization", "eps")
    for i in scheduler.timesteps[:-1]:
        t = (i.double() + 1) / T
        x = scheduler.step(network_output(denoiser, parameterization, x, t), i, x).prev_sample
    times = (torch.arange(steps).flip(0).double() * (T // steps) + 1) / T
    ours = PNDM()(denoiser, start(), times, noise=no_noise)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)
    assert len(scheduler.timesteps) == PNDM().nfe(steps)


# ---- Euler in σ, with α = 1 ----


def by_sigma(scheduler, denoiser, sigmas, x):
    """diffusers' loop where a scheduler takes samples of α = 1, as diffx's EDM schedule has them."""
    scheduler.is_scale_input_called = True
    for k, i in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser(x, sigmas[k].double() / denoiser.schedule.sigma_max), i, x).prev_sample
    return x


OPTIONS = {"karras": (Karras, "use_karras_sigmas"), "exponential": (LogSNR, "use_exponential_sigmas")}


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("option", OPTIONS)
def test_euler_and_its_grids(option, steps):
    grid, name = OPTIONS[option]
    scheduler = EulerDiscreteScheduler(prediction_type="sample", **{name: True})
    alphas_cumprod = scheduler.alphas_cumprod.double()
    sigma_max, sigma_min = (((1 - a) / a).sqrt().item() for a in (alphas_cumprod[-1], alphas_cumprod[0]))
    scheduler.set_timesteps(steps)
    denoiser = mixture(EDM(sigma_max))
    times = grid(sigma_min=sigma_min, sigma_max=sigma_max)(denoiser.schedule, steps)
    # float32, and the table's ends in float32
    torch.testing.assert_close(scheduler.sigmas.double(), sigma_max * times, rtol=1e-4, atol=0)
    x = sigma_max * start()
    scheduler.sigmas = sigma_max * times
    expected = by_sigma(scheduler, denoiser, scheduler.sigmas, x)
    for sampler in (DDIM(), Euler()):
        ours = sampler(denoiser, x, times, noise=no_noise)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 30])
def test_euler_ancestral(monkeypatch, steps):
    denoiser = mixture(EDM(80.0))
    times = Karras()(denoiser.schedule, steps)
    scheduler = EulerAncestralDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = 80 * times
    drawn = iter(range(steps))
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *a, **k: noise(next(drawn)))
    scheduler.is_scale_input_called = True
    x = expected = 80 * start()
    for k, i in enumerate(scheduler.timesteps):
        # it knows no prediction of x̂
        eps = (expected - denoiser(expected, times[k])) / (80 * times[k])
        expected = scheduler.step(eps, i, expected).prev_sample
    ours = DDIM(eta=1)(denoiser, x, times, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# ---- zero terminal SNR ----


def test_the_zero_snr_table():
    # diffusers keeps the first step's √ᾱ_1, diffx the clean end's √ᾱ_0 = 1: both shift by √ᾱ_T and scale, so that the
    # tables are proportional, by √ᾱ_1·(1 − √ᾱ_T)/(√ᾱ_1 − √ᾱ_T) = 1 − 3e-7
    plain = torch.exp(Tabulated.ddpm().log_alpha_bar[1:] / 2)
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    alpha, _ = ZeroSNR(Tabulated.ddpm())((torch.arange(1000, dtype=F64) + 1) / 1000)
    ratio = plain[0] * (1 - plain[-1]) / (plain[0] - plain[-1])
    assert abs(ratio - 1) < 1e-6
    assert alpha[-1] == 0 == scheduler.alphas_cumprod[-1]
    torch.testing.assert_close((alpha * ratio) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_from_zero_snr(steps, eta):
    denoiser = mixture(ZeroSNR(Tabulated.ddpm()))
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.alphas_cumprod = denoiser.schedule((torch.arange(1000, dtype=F64) + 1) / 1000)[0] ** 2
    scheduler.set_timesteps(steps)
    noises = {"variance_noise": noise} if eta > 0 else {}
    expected = through_diffusers(scheduler, denoiser, V(), start(), eta=lambda k: eta, **noises)
    torch.testing.assert_close(through_diffx(DDIM(eta), denoiser, start(), steps), expected, rtol=1e-7, atol=1e-7)
