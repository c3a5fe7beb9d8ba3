"""A change of parameterization changes neither x̂ nor, at equal weighting, the loss."""

import itertools

import pytest
import torch
from conftest import F64, build, choices, each
from torch import nn

from diffx.denoisers import LearnedVariance, Preconditioned
from diffx.objectives import Denoising
from diffx.parameterizations import EDM, Eps, FlowVelocity, V
from diffx.time_samplers import TimeSampler
from diffx.utils import DiffxError, Keys, expand_as


def frozen(choice):
    return build("schedule", choice).requires_grad_(False)


def is_undefined(schedule, parameterization):
    """Whether x̂ would be divided by an α of 0 at the noisy end."""
    end = build("parameterization", parameterization)(*frozen(schedule)(torch.ones(())))
    return not all(c.isfinite() for c in end)


ALL = list(itertools.product(choices("schedule"), choices("parameterization")))
PAIRS = [pair for pair in ALL if not is_undefined(*pair)]
UNDEFINED = [pair for pair in ALL if is_undefined(*pair)]


def covering():
    """Triples of schedule, parameterization and weighting in which each two choices meet at least once."""
    weightings = choices("weighting")
    triples = [(s, p, weightings[k % len(weightings)]) for k, (s, p) in enumerate(PAIRS)]
    met = {pair for s, p, w in triples for pair in ((s, w), (p, w))}
    for k, (s, w) in enumerate(itertools.product(choices("schedule"), weightings)):
        possible = [p for q, p in PAIRS if q == s]
        p = next((p for p in possible if (p, w) not in met), possible[k % len(possible)])
        if (s, w) not in met or (p, w) not in met:
            triples.append((s, p, w))
            met |= {(s, w), (p, w)}
    assert all((p, w) in met for p in choices("parameterization") for w in weightings)
    return triples


every_pair = pytest.mark.parametrize(("schedule", "parameterization"), PAIRS)
every_triple = pytest.mark.parametrize(("schedule", "parameterization", "weighting"), covering())
every_shape = pytest.mark.parametrize("shape", [(4, 4), (4, 3, 2, 2)], ids=["B = D", "BCHW"])


def estimate(x_t, alpha, sigma):
    """Some x̂ function, nothing like a network's and different for each sample and noise level."""
    return torch.tanh(3 * alpha * x_t / (alpha**2 + sigma**2)) + 0.1 * torch.sin(x_t / (alpha + sigma))


class Known(nn.Module):
    """The network whose output, under the given parameterization, is `estimate`.

    It knows its input and logSNR only: whatever else `Preconditioned` scales wrongly shows up.
    """

    def __init__(self, schedule, parameterization):
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, x, logsnr):
        alpha, sigma = (expand_as(c, x) for c in self.schedule(self.schedule.inverse(logsnr)))
        c_in, c_skip, c_out = self.parameterization(alpha, sigma)
        x_t = x / c_in
        return (estimate(x_t, alpha, sigma) - c_skip * x_t) / c_out


class Times(TimeSampler):
    """Given times."""

    def __init__(self, t):
        self.t = t

    def __call__(self, schedule, keys):
        return self.t, torch.ones_like(self.t)


class Constant(nn.Module):
    """A network of bounded output, that can be trained."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, logsnr):
        return torch.tanh(x) + self.bias


def denoiser_of(schedule, parameterization):
    schedule, parameterization = frozen(schedule), build("parameterization", parameterization)
    return Preconditioned(Known(schedule, parameterization), schedule, parameterization)


def data(shape):
    keys = Keys(0, torch.arange(shape[0]))
    return keys.normal("x", *shape[1:], dtype=F64), keys


T = torch.tensor([0.02, 0.3, 0.7, 0.98], dtype=F64)


@every_pair
@every_shape
def test_the_same_estimate_through_each(schedule, parameterization, shape):
    denoiser = denoiser_of(schedule, parameterization)
    x, keys = data(shape)
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(T))
    x_t = alpha * x + sigma * keys.normal("z", *shape[1:], dtype=F64)
    expected = estimate(x_t, alpha, sigma)
    torch.testing.assert_close(denoiser(x_t, T), expected, rtol=1e-7, atol=1e-7)
    # one time for all, shape []
    for k, t in enumerate(T):
        torch.testing.assert_close(denoiser(x_t[k : k + 1], t), expected[k : k + 1], rtol=1e-7, atol=1e-7)


@every_triple
def test_loss_is_the_weighted_error_of_the_estimate(schedule, parameterization, weighting, shape=(4, 4)):
    denoiser, weight = denoiser_of(schedule, parameterization), build("weighting", weighting)
    x, keys = data(shape)
    out = Denoising(Times(T), weight)(denoiser, x, keys)
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(T))
    x_hat = estimate(alpha * x + sigma * keys.normal("noise", *shape[1:], dtype=F64), alpha, sigma)
    expected = weight(denoiser, T) * (x_hat - x).square().flatten(1).mean(1) + weight.penalty(denoiser, T)
    assert out["loss"].shape == (shape[0],)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(out["logsnr"], denoiser.schedule.logsnr(T))


IN_X_HAT = [choice for choice in choices("weighting") if choice != "unit"]
TURNS = max(len(IN_X_HAT), len(choices("schedule")))


@pytest.mark.parametrize(
    ("schedule", "weighting"),
    [(choices("schedule")[k % len(choices("schedule"))], IN_X_HAT[k % len(IN_X_HAT)]) for k in range(TURNS)],
)
def test_parameterization_alone_never_changes_the_objective(schedule, weighting):
    x, keys = data((4, 5))
    losses = [
        Denoising(Times(T), build("weighting", weighting))(denoiser_of(schedule, p), x, keys)["loss"]
        for s, p in PAIRS
        if s == schedule
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-10)


@every_pair
def test_unit_is_the_error_of_the_networks_output(schedule, parameterization):
    denoiser = denoiser_of(schedule, parameterization)
    x, keys = data((4, 5))
    loss = Denoising(Times(T), build("weighting", "unit"))(denoiser, x, keys)["loss"]
    alpha, sigma = (expand_as(c, x) for c in denoiser.schedule(T))
    x_t = alpha * x + sigma * keys.normal("noise", 5, dtype=F64)
    at = denoiser.coefficients(T)
    output = denoiser.network(x_t, at)
    target = (x - expand_as(at.c_skip, x) * x_t) / expand_as(at.c_out, x)
    torch.testing.assert_close(loss, (output - target).square().mean(1), rtol=1e-6, atol=1e-10)


TARGETS = {
    "eps": lambda x, z, a, s: z,
    "x0": lambda x, z, a, s: x,
    "v": lambda x, z, a, s: (a * z - s * x) / (a**2 + s**2).sqrt(),
    "flow": lambda x, z, a, s: z - x,
    "score": lambda x, z, a, s: -z / s,
}


@pytest.mark.parametrize(("schedule", "parameterization"), [pair for pair in PAIRS if pair[1] in TARGETS])
def test_the_networks_target_is_the_papers(schedule, parameterization):
    target = TARGETS[parameterization]
    alpha, sigma = frozen(schedule)(T)
    x, z = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    _, c_skip, c_out = build("parameterization", parameterization)(alpha, sigma)
    torch.testing.assert_close((x - c_skip * (alpha * x + sigma * z)) / c_out, target(x, z, alpha, sigma))


@each("schedule")
@each("parameterization")
def test_input_of_the_network_has_unit_variance(schedule, parameterization):
    parameterization = build("parameterization", parameterization)
    alpha, sigma = frozen(schedule)(T)
    std = getattr(parameterization, "sigma_data", 1.0)  # of the data it is meant for
    variance = parameterization(alpha, sigma)[0] ** 2 * ((alpha * std) ** 2 + sigma**2)
    if isinstance(parameterization, FlowVelocity):  # flow matching feeds x_t itself, between 1/2 and 1
        assert (variance > 0.49).all() and (variance < 1 + 1e-12).all()
    else:
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-12, atol=0)


def test_edm_target_has_unit_variance():
    sigma = torch.logspace(-3, 3, 13, dtype=F64)
    for alpha in (1.0, 0.3):
        alpha = torch.full_like(sigma, alpha)
        _, c_skip, c_out = EDM(0.7)(alpha, sigma)
        # of (x − c_skip·x_t)/c_out with x of standard deviation σ_d
        variance = (((1 - c_skip * alpha) * 0.7) ** 2 + (c_skip * sigma) ** 2) / c_out**2
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-9, atol=0)


def weights_of(weighting, schedule, parameterization):
    schedule = frozen(schedule)
    denoiser = Preconditioned(nn.Identity(), schedule, build("parameterization", parameterization))
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    return build("weighting", weighting)(denoiser, t), schedule.logsnr(t).exp(), t


@each("schedule")
def test_the_table_of_weightings(schedule):
    if (schedule, "eps") in PAIRS:
        unit, snr, _ = weights_of("unit", schedule, "eps")
        torch.testing.assert_close(unit, snr)
        unit, snr, t = weights_of("unit", schedule, "score")
        torch.testing.assert_close(unit, snr / frozen(schedule)(t)[1] ** 2)
    unit, snr, t = weights_of("unit", schedule, "x0")
    assert (unit == 1).all()
    unit, *_ = weights_of("unit", schedule, "v")
    torch.testing.assert_close(unit, snr + 1)
    unit, *_ = weights_of("unit", schedule, "flow")
    torch.testing.assert_close(unit, snr * (1 + snr**-0.5) ** 2)
    if schedule == "flow":
        torch.testing.assert_close(unit, t**-2)
    unit, *_ = weights_of("unit", schedule, "edm")
    torch.testing.assert_close(unit, snr + 1 / 0.5**2)
    torch.testing.assert_close(weights_of("edm", schedule, "x0")[0], unit)
    torch.testing.assert_close(weights_of("snr", schedule, "x0")[0], snr)
    torch.testing.assert_close(weights_of("min_snr", schedule, "x0")[0], torch.minimum(snr, torch.full_like(snr, 5)))


def test_edms_weighting_is_the_papers():
    weight, *_ = weights_of("edm", "edm", "x0")
    sigma = 80 * torch.linspace(0.01, 0.99, 50, dtype=F64)
    torch.testing.assert_close(weight, (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2)


@pytest.mark.parametrize("parameterization", [Eps(), V()])
def test_min_snr_on_the_networks_error_is_the_papers(parameterization):
    # arXiv 2303.09556: min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v; a weight on ‖F − F*‖² is w·c_out²
    schedule = build("schedule", "cosine")
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    denoiser = Preconditioned(nn.Identity(), schedule, parameterization)
    snr = schedule.logsnr(t).exp()
    on_output = build("weighting", "min_snr")(denoiser, t) * parameterization(*schedule(t))[2] ** 2
    expected = snr.clamp(max=5) / (snr if isinstance(parameterization, Eps) else snr + 1)
    torch.testing.assert_close(on_output, expected)


def test_what_is_undefined():
    ends_at_zero = {"flow", "time_shift", "gvp", "zero_snr"}
    assert set(UNDEFINED) == set(itertools.product(ends_at_zero, {"eps", "score"}))


@pytest.mark.parametrize("denoiser", [Preconditioned, LearnedVariance])
@pytest.mark.parametrize(("schedule", "parameterization"), UNDEFINED)
def test_what_is_undefined_is_refused(denoiser, schedule, parameterization):
    with pytest.raises(DiffxError) as refusal:
        denoiser(nn.Identity(), frozen(schedule), build("parameterization", parameterization))
    message = str(refusal.value)
    assert "alpha reaches 0" in message and "parameterization=v" in message and "\n" not in message


@every_triple
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_loss_and_gradient_are_finite_at_extreme_times(schedule, parameterization, weighting, dtype):
    backbone = Constant()
    denoiser = Preconditioned(backbone, frozen(schedule), build("parameterization", parameterization))
    t = torch.tensor([1e-7, 1e-5, 1e-3, 0.999, 1.0], dtype=dtype)
    keys = Keys(0, torch.arange(5))
    out = Denoising(Times(t), build("weighting", weighting))(denoiser, keys.normal("x", 3, 2, 2, dtype=dtype), keys)
    assert out["loss"].isfinite().all()
    out["loss"].mean().backward()
    assert backbone.bias.grad.isfinite()
    if weighting == "unit" and parameterization != "score":  # bounded network, bounded target
        assert out["loss"].max() < 100


@every_pair
def test_the_loss_in_float32_is_that_in_float64(schedule, parameterization):
    denoiser = Preconditioned(Constant(), frozen(schedule), build("parameterization", parameterization))
    # the score of nearly clean data is all but infinite, and sub-VP's σ is the square of the others'
    steep = parameterization == "score" or schedule == "sub_vp"
    t = torch.tensor([*((1e-2, 2e-2) if steep else (1e-5, 1e-3)), 0.1, 0.9, 0.999, 1.0])
    keys = Keys(0, torch.arange(6))
    x = keys.normal("x", 3, 2, 2)
    single = Denoising(Times(t), build("weighting", "unit"))(denoiser, x, keys)["loss"]
    double = Denoising(Times(t.double()), build("weighting", "unit"))(denoiser, x.double(), keys)["loss"]
    # 1 − α is 1e-5 at the first time, and α has a last bit of 6e-8
    torch.testing.assert_close(single[:1].double(), double[:1], rtol=5e-3, atol=0)
    torch.testing.assert_close(single[1:].double(), double[1:], rtol=2e-4, atol=0)


@every_pair
def test_only_the_network_runs_in_reduced_precision(schedule, parameterization):
    schedule, parameterization = frozen(schedule), build("parameterization", parameterization)
    t = torch.tensor([0.003, 0.2, 0.8, 1.0])
    x = Keys(0, torch.arange(4)).normal("x", 5)

    class Low(nn.Module):
        def forward(self, x, logsnr):
            assert x.dtype == logsnr.dtype == torch.float32
            return x.to(torch.bfloat16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = Preconditioned(Low(), schedule, parameterization)(x, t)
    c_in, c_skip, c_out = (c[:, None] for c in parameterization(*schedule(t)))
    assert x_hat.dtype == torch.float32
    torch.testing.assert_close(x_hat, c_skip * x + c_out * (c_in * x).to(torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4), (4, 4), (1,)])
def test_a_coefficient_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="coefficient"):
        expand_as(torch.ones(shape), torch.ones(4, 4))


def test_a_coefficient_multiplies_sample_by_sample():
    c, x = torch.arange(4.0), torch.ones(4, 4)
    assert (expand_as(c, x) * x).equal(c[:, None].expand(4, 4))
    assert expand_as(torch.tensor(2.0), x).shape == ()
