"""Every weighting is its paper's, in x̂-space, and those that coincide by the docstrings do so on every schedule."""

import math

import pytest
import torch
from conftest import F64, build, choices, each, gaussian
from torch import nn

from diffx.denoisers import Preconditioned
from diffx.objectives import Denoising
from diffx.parameterizations import EDM as EDMPreconditioning
from diffx.parameterizations import X0, Eps, FlowVelocity, V
from diffx.schedules import Cosine, Flow
from diffx.time_samplers import TimeSampler
from diffx.utils import DiffxError, Keys
from diffx.weightings import (
    EDM,
    ELBO,
    P2,
    SNR,
    Constant,
    FlowMatching,
    LearnedUncertainty,
    MinSNR,
    OverLogSNR,
    Sigmoid,
    SoftMinSNR,
    TruncatedSNR,
    Unit,
)

torch.set_num_threads(1)

T = torch.linspace(0.01, 0.99, 50, dtype=F64)


def model(schedule, parameterization=None):
    schedule = build("schedule", schedule) if isinstance(schedule, str) else schedule
    return Preconditioned(nn.Identity(), schedule.requires_grad_(False), parameterization or X0())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@each("schedule")
@each("weighting")
def test_weights_are_finite_and_positive(schedule, weighting):
    denoiser = model(schedule)
    weighting = build("weighting", weighting)
    for t in (T, torch.linspace(1e-5, 0.999, 30), torch.tensor([1e-6, 1e-5])):
        w, penalty = weighting(denoiser, t), weighting.penalty(denoiser, t)
        assert w.shape == penalty.shape == t.shape and w.dtype == penalty.dtype == t.dtype
        assert w.isfinite().all() and (w > 0).all() and (penalty == 0).all()
    assert weighting(denoiser, torch.ones(1)).isfinite().all()


PAIRS = {
    "snr = unit x eps": (SNR(), Unit(), Eps()),
    "constant = unit x x0": (Constant(), Unit(), X0()),
    "edm(1) = unit x v": (EDM(1.0), Unit(), V()),
    "edm = unit x edm": (EDM(0.7), Unit(), EDMPreconditioning(0.7)),
    "flow matching = unit x flow": (FlowMatching(), Unit(), FlowVelocity()),
    "p2(gamma 0) = snr": (P2(gamma=0.0), SNR(), X0()),
    "soft min-SNR = sigmoid(log gamma)": (SoftMinSNR(4.0), Sigmoid(math.log(4.0)), X0()),
    "elbo = snr over logSNR": (ELBO(), OverLogSNR(SNR()), X0()),
    "learned = its base at the start": (LearnedUncertainty(EDM(0.4)), EDM(0.4), X0()),
}


@each("schedule")
@pytest.mark.parametrize("pair", PAIRS)
def test_weightings_that_coincide(schedule, pair):
    one, other, parameterization = PAIRS[pair]
    if isinstance(parameterization, Eps) and build("schedule", schedule)(torch.ones(()))[0] == 0:
        with pytest.raises(DiffxError):
            model(schedule, parameterization)  # nothing to coincide with
        return
    denoiser = model(schedule, parameterization)
    same(one(denoiser, T), other(denoiser, T))
    # and neither is a constant multiple of a third one
    ratio = one(denoiser, T) / P2(0.3, 2.0)(denoiser, T)
    assert ratio.max() > 1.5 * ratio.min()


@each("schedule")
def test_weightings_that_coincide_up_to_a_factor_or_in_a_range(schedule):
    denoiser = model(schedule)
    snr = denoiser.schedule.logsnr(T).exp()
    same(SoftMinSNR(3.0)(denoiser, T), 3.0 * P2(k=3.0, gamma=1.0)(denoiser, T))
    same(MinSNR(5.0)(denoiser, T)[snr <= 5], SNR()(denoiser, T)[snr <= 5])
    same(TruncatedSNR()(denoiser, T)[snr >= 1], SNR()(denoiser, T)[snr >= 1])
    same(TruncatedSNR()(denoiser, T)[snr <= 1], Constant()(denoiser, T)[snr <= 1])
    low = snr < 1e3
    torch.testing.assert_close(Sigmoid(20.0)(denoiser, T)[low], snr[low], rtol=1e-5, atol=0)
    # half the harmonic mean: below the minimum, by a factor of two at most
    soft, hard = SoftMinSNR(4.0)(denoiser, T), MinSNR(4.0)(denoiser, T)
    assert (soft < hard).all() and (soft >= hard / 2 - 1e-12).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "ve"])
def test_on_the_noise_error_they_are_the_papers(schedule):
    # a weight on ‖ε̂ − ε‖² is w·σ²/α²
    denoiser = model(schedule, Eps())
    logsnr = denoiser.schedule.logsnr(T)
    snr = logsnr.exp()

    def on_noise(weighting):
        return weighting(denoiser, T) * Eps()(*denoiser.schedule(T))[2] ** 2

    same(on_noise(P2(k=1.0, gamma=0.5)), (1 + snr) ** -0.5)  # arXiv 2204.00227
    same(on_noise(P2(k=2.0, gamma=1.0)), 1 / (2 + snr))
    same(on_noise(Sigmoid(-1.0)), torch.sigmoid(-1.0 - logsnr))  # arXiv 2303.00848, 2410.19324
    same(on_noise(TruncatedSNR()), torch.maximum(torch.ones_like(snr), 1 / snr))  # arXiv 2202.00512


def test_soft_min_snr_with_edms_data_is_the_papers():
    # 1/(σ² + σ_d²) on x̂ is (σ·σ_d)²/(σ² + σ_d²)² on the output of EDM's network (arXiv 2401.11605)
    denoiser = model("edm", EDMPreconditioning(0.5))
    sigma = 80 * T
    c_out = denoiser.parameterization(*denoiser.schedule(T))[2]
    same(SoftMinSNR(4.0)(denoiser, T) * c_out**2, (sigma * 0.5) ** 2 / (sigma**2 + 0.5**2) ** 2)


def test_flow_matching_on_the_flow_schedule_is_the_inverse_square():
    same(FlowMatching()(model("flow"), T), T**-2)


@each("schedule")
@pytest.mark.parametrize("weighting", [SNR(), Sigmoid(-1.0), EDM()], ids=lambda w: type(w).__name__)
def test_over_logsnr_is_an_integral_over_logsnr(schedule, weighting):
    denoiser = model(schedule)
    schedule = denoiser.schedule
    # in smooth pieces of time, by the trapezoidal rule over u = t² where the weight is largest
    u = torch.linspace(0.1, 0.9, 4001, dtype=F64)
    in_time = torch.trapezoid(OverLogSNR(weighting)(denoiser, u), u)
    values = schedule.logsnr(u)
    over = -torch.trapezoid(0.5 * weighting(denoiser, u), values)
    torch.testing.assert_close(in_time, over, rtol=2e-4, atol=0)


@each("schedule")
@pytest.mark.parametrize("std", [0.3, 2.0])
def test_elbo_under_uniform_times_is_the_information_in_nats(schedule, std):
    # for Gaussian data E‖x̂ − x‖² = s²/(1 + s²·SNR), whose integral ½·∫ dSNR is a difference of logarithms, whatever
    # the schedule: arXiv 2107.00630, Eq. 17
    schedule = build("schedule", schedule).requires_grad_(False)
    denoiser = gaussian(schedule, 0.0, std)
    t = torch.linspace(0.02, 0.98, 8001, dtype=F64)
    weight = ELBO()(denoiser, t)
    # the oracle's own error at x = s·a, z = b for the four sign pairs, exact for a linear estimate
    alpha, sigma = schedule(t)
    error = torch.zeros_like(t)
    for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        x = torch.full_like(t, a * std)
        x_hat = denoiser((alpha * x + sigma * b)[:, None], t)[:, 0]
        error += (x_hat - x) ** 2 / 4
    bound = torch.trapezoid(weight * error, t)
    first, last = torch.log1p(std**2 * schedule.logsnr(t[[0, -1]]).exp())
    torch.testing.assert_close(bound, (first - last) / 2, rtol=2e-4, atol=0)


class Times(TimeSampler):
    def __init__(self, t):
        self.t = t

    def __call__(self, schedule, keys):
        return self.t, torch.full_like(self.t, 0.5)


def test_a_learned_schedules_weight_has_a_gradient():
    class Learned(Flow):
        def __init__(self):
            super().__init__()
            self.power = nn.Parameter(torch.tensor(1.3, dtype=F64))

        def forward(self, t):
            return 1 - t**self.power, t**self.power

    schedule = Learned()
    denoiser = Preconditioned(nn.Identity(), schedule, X0())
    # ∂/∂p of −½·d/dt (t^−p − 1)², against a finite difference
    (slope,) = torch.autograd.grad(ELBO()(denoiser, T).sum(), schedule.power)
    sums = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            schedule.power.add_(h)
        sums.append(ELBO()(denoiser, T).sum().item())
        with torch.no_grad():
            schedule.power.sub_(h)
    assert slope.item() == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-6)
    with torch.no_grad():
        assert not ELBO()(denoiser, T).requires_grad


def test_learned_uncertainty_learns_the_expected_loss():
    # a network whose error is known: x̂ = 0, data of variance s²
    class Zero(nn.Module):
        def forward(self, x, logsnr):
            return torch.zeros_like(x)

    denoiser = Preconditioned(Zero(), Cosine(), X0())
    weighting = LearnedUncertainty(EDM(0.5))
    t = torch.linspace(0.05, 0.95, 64)
    objective = Denoising(Times(t), weighting)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    x = 2 * torch.ones(64, 3)
    keys = Keys(0, torch.arange(64))
    start = objective(denoiser, x, keys)["loss"]
    torch.testing.assert_close(start, 0.5 * 4 * EDM(0.5)(denoiser, t))
    for _ in range(500):
        optimizer.zero_grad()
        objective(denoiser, x, keys)["loss"].mean().backward()
        optimizer.step()
    u = weighting.penalty(denoiser, t)
    expected = torch.log(4 * EDM(0.5)(denoiser, t))
    assert expected.max() - expected.min() > 3
    torch.testing.assert_close(u, expected, rtol=0, atol=0.35)
    # all noise levels count alike, and the loss carries the penalty, both corrected
    weighted = weighting(denoiser, t) * 4
    torch.testing.assert_close(weighted, torch.ones(64), rtol=0.4, atol=0)
    torch.testing.assert_close(objective(denoiser, x, keys)["loss"], 0.5 * (weighted + u), rtol=1e-5, atol=1e-6)


def test_the_weight_is_a_part_of_the_checkpoint():
    objective = Denoising(Times(T), build("weighting", "learned_uncertainty"))
    assert [name for name, _ in objective.named_parameters()] == [
        "weighting.uncertainty.weight",
        "weighting.uncertainty.bias",
    ]


@pytest.mark.parametrize("weighting", [c for c in choices("weighting") if c != "unit"])
def test_the_yaml_files_differ(weighting):
    denoiser = model("cosine")
    mine = build("weighting", weighting)(denoiser, T)
    for other in choices("weighting"):
        # the learned one starts at EDM's; x0's own error is the constant weighting
        if other != weighting and {weighting, other} not in ({"learned_uncertainty", "edm"}, {"unit", "constant"}):
            assert not mine.allclose(build("weighting", other)(denoiser, T), rtol=1e-3), other
