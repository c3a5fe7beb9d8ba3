"""The sampling path waits for nothing: no synchronisation and no schedule evaluation per step, one shape, one writer.

A loop runs here on a device that is not there: PyTorch's fake tensors have shapes and no values, and asking one for its
value, as `.item()`, `bool()` or `nonzero()` do, is an error. On a GPU each of them would wait for the device.
"""

import threading
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import F64, build, choices, mixture, no_noise
from test_cli import TINY, run
from test_generate import CLASSES, SHAPE, assert_same_pictures, generator_of, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from diffx.cli.sample import _behind
from diffx.conditioning import LabelConditioner
from diffx.denoisers import Autocast, Denoiser, LearnedVariance, Rescheduled, learned_variance, preconditioned
from diffx.discretizations import Uniform
from diffx.generate import Generated
from diffx.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    DynamicThresholding,
    Negative,
    Projected,
    StaticThresholding,
    ToldNothing,
)
from diffx.parameterizations import V
from diffx.samplers import Counted
from diffx.schedules import Cosine, Linear
from diffx.utils import DiffxError

torch.set_num_threads(1)

LABELS = LabelConditioner(CLASSES)
INTERVAL = [0.3, 2.0]
WAITS = (DataDependentOutputException, DynamicOutputShapeException)
STEPS = 5


class Null(nn.Module):
    """A network without weights that knows its label; it counts its calls and the samples in them."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, logsnr, label=None):
        self.batches.append(len(x))
        shift = 0.1 * logsnr.tanh() + (0 if label is None else 0.05 * label)
        return torch.cat([x.tanh() + shift[:, None, None, None], 0 * x], 1)


class Classifier(nn.Module):
    def forward(self, u, logsnr):
        return u.flatten(1)[:, :CLASSES] * torch.sigmoid(logsnr)[:, None]


def model():
    return LearnedVariance(Null(), Cosine(), V())


# what may stand around a model; each asks for more than one forward inside its interval, or bounds what it gets
AROUND = {
    "nothing": lambda d: d,
    "cfg": lambda d: ClassifierFree(d, LABELS, 3.0, INTERVAL),
    "cfg everywhere": lambda d: ClassifierFree(d, LABELS, 3.0),
    "apg, rescaled": lambda d: ClassifierFree(d, LABELS, 3.0, INTERVAL, rescale=0.7, rule=Projected(0.1, 2.0)),
    "negative": lambda d: Negative(d, LABELS, 2, 3.0, INTERVAL),
    "autoguidance": lambda d: Autoguidance(d, model(), 2.0, INTERVAL),
    "autoguidance, another schedule": lambda d: Autoguidance(d, Rescheduled(model(), Linear()), 2.0, INTERVAL),
    "classifier": lambda d: ClassifierGuidance(d, LABELS, Classifier(), 2.0, INTERVAL),
    "stacked": lambda d: Autoguidance(ClassifierFree(d, LABELS, 3.0, INTERVAL), model(), 2.0, [0.1, 1.0]),
    "told nothing": lambda d: ToldNothing(d, LABELS),
    "static": lambda d: StaticThresholding(ClassifierFree(d, LABELS, 3.0, INTERVAL)),
    "dynamic": lambda d: DynamicThresholding(ClassifierFree(d, LABELS, 3.0, INTERVAL)),
    "counted, 32-true": lambda d: Autocast(Counted(ClassifierFree(d, LABELS, 3.0, INTERVAL)), "32-true"),
}
FIXED = [choice for choice in choices("sampler") if build("sampler", choice).evaluations is not None]


def moved(value, device):
    """Noise levels, within whatever state a sampler keeps, with their times on a device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    return type(value)(moved(part, device) for part in value) if isinstance(value, list | tuple) else value


@pytest.fixture(autouse=True)
def _the_host_has_values(monkeypatch):
    """Of what is asked on the host there are values, on a fake device's too."""

    def coefficients_of(level, parameterization):
        with unset_fake_temporarily():
            return preconditioned.coefficients_of(level, parameterization)

    monkeypatch.setattr(learned_variance, "coefficients_of", coefficients_of)


def _white(x, step, draw=0):
    return torch.randn_like(x)


def loop_on_a_fake_gpu(sampler, denoiser, device="cuda"):
    """Prepares on the CPU, then takes all steps on a device without values."""
    levels = denoiser.schedule.levels(Uniform()(denoiser.schedule, STEPS).float())
    state = sampler.init(denoiser, levels)
    with nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        levels, state = moved(levels, device), moved(state, device)
        x = torch.empty(2, *SHAPE, device=device)
        label = torch.zeros(2, dtype=torch.int64, device=device)
        path = list(sampler.steps(denoiser, x, levels, state, noise=lambda *_, **__: torch.empty_like(x), label=label))
    assert len(path) == STEPS and path[-1].device.type == device and path[-1].shape == (2, *SHAPE)


@pytest.mark.parametrize("sampler", FIXED)
def test_no_step_of_a_sampler_waits_for_the_device(sampler):
    loop_on_a_fake_gpu(build("sampler", sampler), AROUND["static"](model()))


@pytest.mark.parametrize("sampler", ["ddpm_learned", "heun"])
@pytest.mark.parametrize("around", AROUND)
def test_no_guidance_waits_for_the_device(around, sampler):
    # backward runs on no fake GPU, but where there is nothing but shapes
    device = "meta" if around == "classifier" else "cuda"
    loop_on_a_fake_gpu(build("sampler", sampler), AROUND[around](model()), device)


@pytest.mark.parametrize("around", ["cfg", "classifier", "stacked", "static"])
def test_a_wait_would_be_found(around):
    class Deaf(Denoiser):
        """Never told the level: the interval then has to look at t."""

        def __init__(self, denoiser):
            super().__init__()
            self.denoiser, self.schedule = denoiser, denoiser.schedule

        def forward(self, x_t, t, **cond):
            return self.denoiser(x_t, t, **cond)

    with pytest.raises(WAITS):
        loop_on_a_fake_gpu(build("sampler", "ddim"), Deaf(AROUND[around](model())))


def test_only_the_adaptive_sampler_waits():
    # how long a step may be is in its error, on the device
    assert {*choices("sampler")} - {*FIXED} == {"adaptive"}
    with pytest.raises(WAITS):
        loop_on_a_fake_gpu(build("sampler", "adaptive"), model())


@pytest.mark.parametrize("sampler", FIXED)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here to be waited for")
def test_no_step_synchronises_a_gpu(sampler):
    denoiser, sampler = AROUND["stacked"](model()), build("sampler", sampler)
    levels = denoiser.schedule.levels(Uniform()(denoiser.schedule, STEPS).to("cuda", torch.float32))
    state, x = sampler.init(denoiser, levels), torch.randn(2, *SHAPE, device="cuda")
    label = torch.zeros(2, dtype=torch.int64, device="cuda")
    # once before: what is loaded at first use may synchronise
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.no_grad():
                noise = partial(_white, x)
                out = list(sampler.steps(denoiser, x, levels, state, noise=noise, label=label))[-1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


# ---- the decision of the host is that of the device ----


@pytest.mark.parametrize("around", AROUND)
def test_a_denoiser_told_the_level_gives_the_same_estimate(around):
    torch.manual_seed(0)
    denoiser = AROUND[around](model())
    x, label = torch.randn(3, *SHAPE), torch.tensor([0, 4, CLASSES])
    levels = denoiser.schedule.levels(torch.linspace(0.95, 0.05, 19))
    for t, s in pairwise(levels):
        expected = denoiser(x, t.t, label=label)
        # the host knows the coefficients in float64, t is float32
        near = {"rtol": 2e-4, "atol": 2e-4}
        torch.testing.assert_close(denoiser.at(t)(x, t.t, label=label), expected, **near)
        told = denoiser.at(t).posterior(x, t.t, s.t, label=label)
        torch.testing.assert_close(told, denoiser.posterior(x, t.t, s.t, label=label), **near)


def test_the_guide_is_asked_inside_the_interval_alone_and_in_the_same_forward():
    inner = model()
    denoiser = StaticThresholding(ClassifierFree(inner, LABELS, 3.0, INTERVAL))
    times = torch.linspace(0.95, 0.0, 12)
    x, label = torch.randn(2, *SHAPE), torch.zeros(2, dtype=torch.int64)
    build("sampler", "ddim")(denoiser, x, times, noise=no_noise, label=label)
    ratios = (-denoiser.schedule.logsnr(times[:-1]) / 2).exp()
    inside = (INTERVAL[0] < ratios) & (ratios <= INTERVAL[1])
    assert inner.backbone.batches == [4 if within else 2 for within in inside] and 2 < inside.sum() < 9


def test_samples_at_levels_of_their_own_are_guided_each_by_its_own():
    inner = model()
    denoiser = ClassifierFree(inner, LABELS, 3.0, INTERVAL)
    x, label = torch.randn(3, *SHAPE), torch.zeros(3, dtype=torch.int64)
    level = denoiser.schedule.level(torch.tensor([0.05, 0.5, 0.95]), x)
    assert denoiser.at(level) is denoiser
    denoiser.at(level)(x, level.t, label=label)
    assert inner.backbone.batches == [4]


def test_a_replaced_part_leaves_the_original():
    inner, other = model(), model()
    denoiser = StaticThresholding(inner, high=0.5)
    twin = denoiser.replaced(denoiser=other)
    assert (twin.denoiser, twin.high, twin.schedule) == (other, 0.5, inner.schedule)
    assert denoiser.denoiser is inner and denoiser.replaced(denoiser=inner) is denoiser
    assert [name for name, _ in twin.named_children()] == [name for name, _ in denoiser.named_children()]


def test_calls_of_a_denoiser_told_the_level_are_counted():
    denoiser = Counted(ClassifierFree(model(), LABELS, 3.0, INTERVAL))
    x = torch.randn(2, *SHAPE)
    for level in denoiser.schedule.levels(torch.tensor([0.95, 0.5])):
        denoiser.at(level)(x, level.t, label=torch.zeros(2, dtype=torch.int64))
    assert (denoiser.calls, denoiser.samples) == (2, 4)


@pytest.mark.parametrize("sampler", FIXED)
def test_the_loop_evaluates_no_schedule(sampler):
    class Watched(Cosine):
        evaluations = 0

        def forward(self, t):
            self.evaluations += 1
            return super().forward(t)

    class Fixed(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = Watched()

        def forward(self, x_t, t, **cond):
            return 0.5 * x_t

        def posterior(self, x_t, t, s, **cond):
            return 0.5 * x_t, 0.5 * x_t

    inner, sampler = Fixed(), build("sampler", sampler)
    denoiser = StaticThresholding(ClassifierFree(inner, LABELS, 3.0, INTERVAL))
    levels = denoiser.schedule.levels(Uniform()(None, STEPS).float())
    state, x = sampler.init(denoiser, levels), torch.randn(2, *SHAPE)
    before = inner.schedule.evaluations
    label = torch.zeros(2, dtype=torch.int64)
    list(sampler.steps(denoiser, x, levels, state, noise=lambda *_, **__: torch.randn_like(x), label=label))
    assert inner.schedule.evaluations == before > 0


@pytest.mark.parametrize("sampler", FIXED)
def test_no_estimate_is_written_over(sampler):
    """Sums are taken in place, but never in what a denoiser returned: a compiled one owns that memory."""
    returned = []

    class Kept(Denoiser):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.schedule = inner, inner.schedule

        def posterior(self, x_t, t, s, **cond):
            values = self.inner.posterior(x_t, t, s, **cond)
            returned.extend((value, value.clone()) for value in (x_t, *values))
            return values

        def forward(self, x_t, t, **cond):
            return self.posterior(x_t, t, t / 2, **cond)[0]

    denoiser = Kept(mixture(Cosine()))
    x = torch.randn(4, 2, dtype=F64)
    for _ in build("sampler", sampler).trajectory(
        denoiser, x, Uniform()(None, STEPS), noise=lambda *_, **__: torch.ones_like(x)
    ):
        assert all(value.equal(copy) for value, copy in returned)
    assert len(returned) >= 3 * STEPS


# ---- precision ----


def test_networks_alone_are_computed_in_reduced_precision():
    seen = []

    class Seeing(Denoiser):
        def __init__(self):
            super().__init__()
            self.inner, self.schedule = network(), network().schedule

        def forward(self, x_t, t, **cond):
            x_hat = self.inner(x_t, t, **cond)
            seen.append((x_t.dtype, t.dtype, x_hat.dtype, (x_t.flatten(1) @ x_t.flatten(1).T).dtype))
            return x_hat

    products = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    images = {}
    for precision, dtype in products.items():
        generator, _ = generator_of(denoiser=Seeing(), precision=precision)
        latents = list(generator.trajectory(torch.arange(2)))
        assert all(latent.dtype == torch.float32 for latent in latents)
        assert set(seen) == {(torch.float32, torch.float32, torch.float32, dtype)}
        # nothing of it remains between the steps
        for _ in generator.trajectory(torch.arange(2)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        images[precision] = generator(torch.arange(2)).images
        seen.clear()
    plain, _ = generator_of()
    assert plain(torch.arange(2)).images.equal(images["32-true"])
    assert not images["bf16-mixed"].equal(images["32-true"])
    assert (images["bf16-mixed"].int() - images["32-true"].int()).abs().float().mean() < 3


def test_a_precision_that_is_none_is_refused():
    generator, _ = generator_of(precision="bf16-true")
    with pytest.raises(DiffxError, match=r"evaluation\.precision=bf16-true"):
        generator(torch.arange(1))


def test_precision_by_choice_on_the_command_line(capsys):
    code, _, err = run(capsys, "train", *TINY, "evaluation.precision=bf16")
    assert code == 2 and "evaluation.precision must be 32-true or bf16-mixed or 16-mixed" in err


# ---- one shape ----


@pytest.mark.parametrize("sampler", ["heun", "ddpm"])
def test_the_tail_has_the_shape_of_the_batches_before_and_the_same_samples(sampler):
    plain, _ = generator_of(sampler)
    static, spy = generator_of(sampler, static_shapes=True)
    batches = list(static.batches(7, 3))
    assert [len(part.index) for part in batches] == [3, 3, 1]
    assert [len(x) for x in spy.initial] == [3, 3, 3]
    index, label, images = (torch.cat(values) for values in zip(*batches, strict=True))
    assert index.tolist() == list(range(7)) and label.tolist() == [k % CLASSES for k in range(7)]
    expected = torch.cat([part.images for part in plain.batches(7, 3)])
    assert_same_pictures(images, expected)
    # the noise does not depend on the batch at all
    alone, other = generator_of(sampler)
    alone(torch.tensor([6]))
    assert spy.initial[-1][:1].equal(other.initial[0])


def test_a_single_batch_is_not_filled_up():
    static, spy = generator_of(static_shapes=True)
    assert [len(part.index) for part in static.batches(2, 256)] == [2] and [len(x) for x in spy.initial] == [2]


def test_labels_go_round():
    generator, _ = generator_of(static_shapes=True, steps=1)
    labels = torch.cat([part.label for part in generator.batches(8, 3, labels=[7, 2])])
    assert labels.tolist() == [7, 2] * 4


# ---- written while the next batch is sampled ----


def batch(k):
    return Generated(torch.tensor([k]), torch.tensor([0]), torch.full((1, 1, 2, 2), k, dtype=torch.uint8))


def test_a_batch_is_written_while_the_next_is_made():
    written, may_write = [], threading.Event()

    def write(made):
        assert may_write.wait(20)
        written.append(int(made.index))

    with _behind(write) as hand_over:
        hand_over(batch(0))
        assert not written  # and the next one can be made
        may_write.set()
        for k in range(1, 5):
            hand_over(batch(k))
            assert len(written) >= k  # one waits at most
    assert written == list(range(5))


@pytest.mark.parametrize("when", [0, 1, 2])
def test_what_fails_in_writing_is_raised(when):
    def write(made):
        if int(made.index) == when:
            raise DiffxError("the disk is full")

    with pytest.raises(DiffxError, match="disk is full"), _behind(write) as hand_over:
        for k in range(3):
            hand_over(batch(k))


def test_an_interrupted_run_has_written_what_was_handed_over():
    written = []

    @contextmanager
    def file():
        yield lambda made: written.append(int(made.index))
        written.append("closed")

    with pytest.raises(KeyboardInterrupt), file() as write, _behind(write) as hand_over:
        for k in range(3):
            hand_over(batch(k))
        raise KeyboardInterrupt
    assert written == [0, 1, 2]
