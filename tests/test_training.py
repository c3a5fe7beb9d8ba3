"""Training learns, is the same on any number of processes, and no interruption can be told from its result."""

import copy
import csv
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import build as part
from conftest import choices
from rich.console import Console
from torch import nn

from diffx.cli.budget import set_steps
from diffx.cli.build import build
from diffx.cli.compose import compose_config
from diffx.cli.execute import execute
from diffx.cli.train import train
from diffx.experiment import Run, locate
from diffx.experiment.run import step_of
from diffx.experiment.same import TIMES
from diffx.objectives import Denoising, Objective
from diffx.pictures import save_grid
from diffx.training import EMA
from diffx.training.checkpoint_files import read_checkpoint
from diffx.training.flops import training_flops
from diffx.training.log import LOGSNR_EDGES
from diffx.training.loggers import CSVLogger
from diffx.training.weights import load_weights
from diffx.utils import DiffxError, Keys
from diffx.utils.signals import SIGNALS

torch.set_num_threads(1)

TINY = [
    "backbone=unet_tiny",
    "trainer=cpu",
    "extractor=none",
    "training.max_steps=12",
    "data.batch_size=8",
    "lr_schedule.warmup_steps=4",
    "evaluation.every_n_steps=0",
    "evaluation.interim_samples=0",
    "evaluation.num_samples=0",
    "metrics=[fd,is,consistency]",
    "evaluation.per_class=1",
    "sampler.steps=2",
    "checkpoint.every_n_steps=5",
    "log_every_n_steps=1",
    "progress_bar=false",
]
# drop-out draws from the global generator, two micro-batches make a step, and no log window ends at a checkpoint
HARD = [
    "backbone.dropout=0.3",
    "trainer.accumulate_grad_batches=2",
    "training.max_steps=24",
    "log_every_n_steps=7",
    "evaluation.every_n_steps=6",
    "sampler=ddpm",
    "sampler.steps=2",
]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def composed(root, *overrides):
    words = [*TINY, f"runs_dir={root}", *overrides]
    return compose_config("train", words, [], set_steps), words


def arm_and_run(root, *overrides):
    config, words = composed(root, *overrides)
    arm, run = build(config), locate(config["runs_dir"], config, words)
    run.freeze(config)
    return arm, run


def after_each_batch(arm, action):
    """Calls `action(module, micro-batches so far)` behind all callbacks, where a signal may arrive as well as not."""
    count = 0

    def hook(outputs, batch, batch_idx):
        nonlocal count
        count += 1
        action(arm.module, count)

    arm.module.on_train_batch_end = hook


def trained(root, *overrides, action=None, console=None):
    """The exit code, the arm and the run of one training in this process."""
    arm, run = arm_and_run(root, *overrides)
    if action is not None:
        after_each_batch(arm, action)
    return execute(arm, run, console or Console(file=io.StringIO()), run.resume_from()), arm, run


def checkpoint_of(run, step=None):
    """A checkpoint's content, the last one's by default."""
    file = run.checkpoints / f"step={step:08d}.ckpt" if step else run.newest_checkpoint()[0]
    return read_checkpoint(file)


def metrics_of(run):
    """The rows of metrics.csv without the columns that are times."""
    with (run.path / "metrics.csv").open(newline="") as file:
        return [{name: v for name, v in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_identical(actual, expected, where="checkpoint"):
    """Equality bit for bit of nested dicts, lists, tensors and values."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(a, b, f"{where}[{k}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and actual.equal(expected), where
    else:
        assert actual == expected, where


def assert_same_training(run, reference):
    """The last checkpoints of two runs (weights, EMA, optimizer, learning rate, open log window), and their logs."""
    actual, expected = checkpoint_of(run), checkpoint_of(reference)
    assert actual["global_step"] == expected["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "training_log"):
        assert_identical(actual[key], expected[key], key)
    assert metrics_of(run) == metrics_of(reference)
    assert run.weights.read_bytes() == reference.weights.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nothing happened to."""
    code, _, run = trained(tmp_path_factory.mktemp("uninterrupted"), *HARD)
    assert code == 0 and run.state == "finished"
    return run


# ---- interruption ----


def signal_at(number, micro_batch):
    def action(module, count):
        if count == micro_batch:
            os.kill(os.getpid(), number)

    return action


@pytest.mark.parametrize("draw", range(3))
def test_interrupted_again_and_again_ends_as_if_nothing_had_happened(tmp_path, uninterrupted, draw):
    # a signal in the middle of a step too: 48 micro-batches in all
    rng = random.Random(draw)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    left = 48
    for number in rng.sample(SIGNALS, 3):
        micro_batch = rng.randrange(1, max(2, left // 2))
        code, _, run = trained(tmp_path, *HARD, action=signal_at(number, micro_batch))
        assert code == 128 + number
        status = run.status()
        assert (status["state"], status["signal"]) == ("interrupted", number)
        assert run.newest_checkpoint()[0].name == f"step={status['step']:08d}.ckpt"
        assert [signal.getsignal(each) for each in SIGNALS] == handlers
        # nothing lost, and no more done than the step under way and the next
        done = 48 - left + micro_batch
        assert math.ceil(done / 2) <= status["step"] <= done // 2 + 1
        left = 48 - 2 * status["step"]
    code, _, run = trained(tmp_path, *HARD)
    assert code == 0 and run.status() == {"state": "finished", "step": 24}
    assert_same_training(run, uninterrupted)
    assert sorted(p.name for p in run.samples.iterdir()) == sorted(p.name for p in uninterrupted.samples.iterdir())


def test_interrupted_in_the_last_step_is_finished(tmp_path):
    code, _, run = trained(tmp_path, "training.max_steps=3", action=signal_at(signal.SIGTERM, 3))
    assert code == 0 and run.state == "finished"


class Deadly(Objective):
    """Denoising in a process that dies without warning at the micro-batch of number `$DIE_AT`."""

    def __init__(self, time_sampler, weighting):
        super().__init__()
        self.inner = Denoising(time_sampler, weighting)
        self.calls = 0

    def forward(self, denoiser, x, keys, **cond):
        self.calls += 1
        if self.calls == int(os.environ.get("DIE_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(denoiser, x, keys, **cond)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run whose process was killed between two checkpoints, and what was typed."""
    root = tmp_path_factory.mktemp("killed")
    overrides = [*HARD, "objective._target_=test_training.Deadly"]
    words = [*TINY, f"runs_dir={root}", *overrides]
    tests = str(Path(__file__).parent)
    environment = os.environ | {"DIE_AT": "38", "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffx.cli.main", "train", *words]
    process = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    return root, overrides


def test_killed_goes_back_to_the_last_checkpoint(killed, uninterrupted):
    root, overrides = killed
    _, run = arm_and_run(root, *overrides)
    assert run.state == "running"
    newest = step_of(run.newest_checkpoint()[0])
    assert newest in (10, 15)  # the last one may not have been on disk yet
    console = Console(file=io.StringIO())
    code, _, run = trained(root, *overrides, console=console)
    assert f"resuming at step {newest}" in console.file.getvalue()
    assert code == 0 and run.state == "finished"
    assert_same_training(run, uninterrupted)


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path):
    def die(module, count):
        if count == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        trained(tmp_path / "a", action=die)
    (file,) = (tmp_path / "a").glob("*/*/*/metrics.csv")
    assert [row["step"] for row in csv.DictReader(file.open())] == ["1", "2", "3"]
    _, _, run = trained(tmp_path / "a")
    _, _, reference = trained(tmp_path / "b")
    assert_same_training(run, reference)


def test_killed_between_the_last_checkpoint_and_the_weights(tmp_path):
    _, _, run = trained(tmp_path, "training.max_steps=3")
    expected = run.weights.read_bytes()
    run.weights.unlink()
    run.set_status("running", step=0)
    code, _, run = trained(tmp_path, "training.max_steps=3")
    assert code == 0 and run.status() == {"state": "finished", "step": 3}
    assert run.weights.read_bytes() == expected


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    def impatient(module, count):
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trained(tmp_path, action=impatient)
    (file,) = tmp_path.glob("*/*/*/metrics.csv")
    assert not list(file.parent.glob("checkpoints/*"))


# ---- checkpoints ----


def test_checkpoints_every_n_steps_and_at_the_end(tmp_path):
    _, _, run = trained(tmp_path, "checkpoint.keep_last=10")
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step={n:08d}.ckpt" for n in (5, 10, 12)]
    _, _, run = trained(tmp_path / "few", "checkpoint.keep_last=1")
    assert [p.name for p in run.checkpoints.iterdir()] == ["step=00000012.ckpt"]


@pytest.mark.parametrize("length", [0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, capsys, length):
    _, _, reference = trained(tmp_path / "reference")
    _, _, run = trained(tmp_path / "run", action=signal_at(signal.SIGTERM, 9))
    newest, broken = run.newest_checkpoint()
    assert newest.name == "step=00000010.ckpt" and not broken
    content = newest.read_bytes()
    newest.write_bytes(content[: int(length * len(content))])
    console = Console(file=io.StringIO(), width=1000)
    code, _, run = trained(tmp_path / "run", console=console)
    assert code == 0
    assert f"passing over the damaged checkpoint {newest}" in capsys.readouterr().out
    assert "resuming at step 5" in console.file.getvalue()
    assert_same_training(run, reference)


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(tmp_path, capsys):
    _, _, run = trained(tmp_path, action=signal_at(signal.SIGTERM, 9))
    newest, _ = run.newest_checkpoint()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert run.resume_from().name == "step=00000005.ckpt"
    assert f"passing over the damaged checkpoint {newest}" in capsys.readouterr().out


def test_those_to_keep_stay_beside_the_newest(tmp_path):
    _, _, run = trained(
        tmp_path, "checkpoint.keep_last=1", "checkpoint.every_n_steps=2", "checkpoint.keep_every_n_steps=4"
    )
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step={n:08d}.ckpt" for n in (4, 8, 12)]


def test_a_checkpoint_damaged_inside_is_named(tmp_path):
    _, run = arm_and_run(tmp_path)
    file = run.checkpoints / "step=00000005.ckpt"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"nothing")
    with pytest.raises(DiffxError, match=f"'{file}' is damaged .*; delete it to resume from the one before"):
        trained(tmp_path)
    assert run.state == "failed"


@pytest.mark.parametrize("other", ["seed=1", "optimizer.lr=1e-3"])
def test_a_checkpoint_of_another_config_is_refused(tmp_path, other):
    _, _, theirs = trained(tmp_path, "training.max_steps=5", other)
    _, run = arm_and_run(tmp_path, "training.max_steps=5")
    run.checkpoints.mkdir(parents=True)
    newest = theirs.newest_checkpoint()[0]
    (run.checkpoints / newest.name).write_bytes(newest.read_bytes())
    with pytest.raises(DiffxError, match=r"is of another config .* remove it to start anew") as refusal:
        trained(tmp_path, "training.max_steps=5")
    assert str(run.checkpoints) in str(refusal.value) and "\n" not in str(refusal.value)
    assert run.status() == {"state": "failed", "reason": str(refusal.value)}


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path):
    _, run = arm_and_run(tmp_path)
    run.checkpoints.mkdir(parents=True)
    torch.save({"global_step": 5, "evil": Deadly}, run.checkpoints / "step=00000005.ckpt")
    with pytest.raises(DiffxError, match="is damaged"):
        trained(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(module, count):
        if count == 7:
            module.trainer.callbacks[-1].wait()  # for the one of step 5
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(DiffxError, match=r"cannot write .*; free some space") as refusal:
            trained(tmp_path, action=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, run = arm_and_run(tmp_path)
    assert run.status() == {"state": "failed", "reason": str(refusal.value)}
    assert [p.name for p in run.checkpoints.iterdir()] == ["step=00000005.ckpt"]
    trained(tmp_path)
    _, _, reference = trained(tmp_path / "reference")
    assert_same_training(run, reference)


# ---- the average of the weights ----


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_recurrence_once_per_optimizer_step(tmp_path, warmup):
    arm, run = arm_and_run(tmp_path, *HARD, f"ema.warmup={str(warmup).lower()}", "ema.decay=0.7")
    initial = [p.detach().double() for p in arm.module.denoiser.parameters()]
    steps = []

    def look(module, count):
        for average, weight in zip(module.ema.denoiser.parameters(), module.denoiser.parameters(), strict=True):
            assert average.data_ptr() != weight.data_ptr()
        assert not module.ema.denoiser.training and module.denoiser.training
        if count % 2 == 0:
            steps.append([p.detach().double() for p in module.denoiser.parameters()])

    after_each_batch(arm, look)
    execute(arm, run, Console(file=io.StringIO()), None)
    assert len(steps) == 24
    expected = initial
    for n, weights in enumerate(steps, start=1):
        d = min(0.7, (1 + n) / (10 + n)) if warmup else 0.7
        expected = [d * average + (1 - d) * weight for average, weight in zip(expected, weights, strict=True)]
    for average, value, weight in zip(arm.module.ema.denoiser.parameters(), expected, steps[-1], strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)
        assert not average.double().equal(weight)
        assert not average.requires_grad
    # what is exported is the average
    fresh, step = load_weights(build(arm.config).module.ema, "ema", run.weights.parent, None)
    assert step == 24
    assert_identical(fresh.state_dict(), arm.module.ema.denoiser.state_dict())


def test_ema_takes_buffers_as_they_are():
    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("count", torch.tensor(0))

    model = WithBuffer()
    ema = EMA(model, decay=0.5, warmup=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    model.count += 3
    ema.update(model, 1)
    assert ema.denoiser.weight.tolist() == [0.5, 0.5] and ema.denoiser.count == 3
    assert model.weight.tolist() == [1.0, 1.0]


def test_the_weights_of_an_unfinished_run_are_its_average(tmp_path):
    _, arm, run = trained(tmp_path, action=signal_at(signal.SIGTERM, 6))
    assert not run.weights.exists()
    fresh, step = load_weights(build(arm.config).module.ema, "ema", run.weights.parent, run.newest_checkpoint()[0])
    assert step == run.status()["step"] > 0
    assert_identical(fresh.state_dict(), arm.module.ema.denoiser.state_dict())


# ---- what must not change the weights ----


def test_evaluation_leaves_no_trace_in_the_weights(tmp_path):
    dropout = ["backbone.dropout=0.3", "sampler=ddpm", "sampler.steps=2"]
    evaluated = ["evaluation.every_n_steps=2", "evaluation.interim_samples=20", "extractor=digits"]
    averages = {}

    def keep(module, count):
        averages[count] = copy.deepcopy(module.ema.denoiser)

    _, arm, run = trained(tmp_path / "with", *dropout, *evaluated, action=keep)
    _, _, reference = trained(tmp_path / "without", *dropout)
    assert len(list(run.samples.glob("step=*.png"))) == 5
    assert [row["step"] for row in metrics_of(run) if row["eval/fd_digits"]] == ["2", "4", "6", "8", "10"]
    for key in ("state_dict", "optimizer_states"):
        assert_identical(checkpoint_of(run)[key], checkpoint_of(reference)[key], key)
    # and it was the average that was drawn
    save_grid(arm.generator(averages[4]), tmp_path / "expected.png", per_class=1)
    assert (run.samples / "step=00000004.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert (run.samples / "step=00000006.png").read_bytes() != (tmp_path / "expected.png").read_bytes()


def test_where_it_runs_and_logs_leaves_no_trace_in_the_weights(tmp_path):
    _, _, reference = trained(tmp_path / "a", "backbone.dropout=0.3")
    how = ["log_every_n_steps=5", "checkpoint.every_n_steps=3", "progress_bar=true", "trainer=auto"]
    arm, run = arm_and_run(tmp_path / "b", "backbone.dropout=0.3", *how, "trainer.accelerator=cpu")
    torch.rand(7)  # the global generator stands elsewhere
    execute(arm, run, Console(file=io.StringIO()), None)
    assert_identical(checkpoint_of(run)["state_dict"], checkpoint_of(reference)["state_dict"])


def test_seeds_differ(tmp_path):
    _, _, first = trained(tmp_path, "seed=0", "training.max_steps=1")
    _, _, second = trained(tmp_path, "seed=1", "training.max_steps=1")
    assert first.path.parent == second.path.parent and first.weights.read_bytes() != second.weights.read_bytes()


# Adam divides by the root of the second moment: where a gradient is 0 but for rounding, only a large eps keeps it so
ROUNDING = ["optimizer.eps=1e-2", "optimizer.lr=0.1", "training.max_steps=6"]


def assert_close_weights(run, reference, tolerance=1e-5):
    actual, expected = checkpoint_of(run)["state_dict"], checkpoint_of(reference)["state_dict"]
    start = build(reference.config()).module.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())
    moved = [(expected[name] - start[name]).abs().max() > 100 * tolerance for name in start]
    assert sum(moved) > len(moved) / 2  # the weights are not equal for want of training


def test_accumulation_changes_only_rounding(tmp_path):
    _, _, once = trained(tmp_path / "1", *ROUNDING)
    _, _, twice = trained(tmp_path / "2", *ROUNDING, "trainer.accumulate_grad_batches=2")
    assert once.path.parent.name == twice.path.parent.name  # the same experiment
    assert_close_weights(twice, once)
    for row, expected in zip(metrics_of(twice), metrics_of(once), strict=True):
        assert {k: float(v) for k, v in row.items() if v} == pytest.approx(
            {k: float(v) for k, v in expected.items() if v}, rel=1e-3
        )


class Compiled:
    """Counts compilations and compiles to the eager backend, which needs no C++ compiler."""

    def __init__(self, monkeypatch):
        self.count = 0
        compile_ = nn.Module.compile

        def counted(module, *args, **kwargs):
            self.count += 1
            compile_(module, *args, backend="eager", **kwargs)

        monkeypatch.setattr(nn.Module, "compile", counted)


def test_compilation_leaves_names_and_weights_alone(tmp_path, monkeypatch):
    compiled = Compiled(monkeypatch)
    _, _, reference = trained(tmp_path / "a", "training.max_steps=3")
    assert compiled.count == 0
    _, arm, run = trained(tmp_path / "b", "training.max_steps=3", "trainer.compile=true")
    assert compiled.count == 2  # the network and its average
    assert not any("_orig_mod" in name for name in checkpoint_of(run)["state_dict"])
    assert not any("_orig_mod" in name for name in arm.module.state_dict())
    assert run.weights.read_bytes() == reference.weights.read_bytes()


def test_bf16_keeps_float32_weights(tmp_path):
    arm, run = arm_and_run(tmp_path, "training.precision=bf16-mixed", "training.max_steps=3")
    inside = []
    arm.module.denoiser.backbone.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    initial = copy.deepcopy(arm.module.denoiser.state_dict())
    execute(arm, run, Console(file=io.StringIO()), None)
    assert set(inside) == {torch.bfloat16}
    saved = checkpoint_of(run)
    for tensor in [*saved["state_dict"].values(), *_tensors(saved["optimizer_states"])]:
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    assert any(not saved["state_dict"][f"denoiser.{name}"].equal(value) for name, value in initial.items())
    assert all(math.isfinite(float(row["loss"])) for row in metrics_of(run))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_follows_training_stays_there(tmp_path):
    overrides = ["trainer=gpu", "trainer.compile=false"]
    code, _, run = trained(tmp_path, *overrides, action=signal_at(signal.SIGTERM, 6))
    assert code == 128 + signal.SIGTERM
    code, arm, run = trained(tmp_path, *overrides)
    # Lightning moves the module to the CPU at the end, where the final evaluation would take hours
    assert code == 0 and arm.module.device.type == "cuda"
    assert {p.device.type for p in arm.module.parameters()} == {"cuda"}
    assert (run.samples / "final.png").is_file()


def _tensors(nested):
    if isinstance(nested, torch.Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else []
    return [tensor for value in values for tensor in _tensors(value)]


# ---- learning ----


def held_out_loss(arm):
    """The loss on images not trained on, with fixed times and noises."""
    batch = arm.source.split("test").get(torch.arange(256))
    x = arm.module.autoencoder.encode(batch)
    keys = Keys(7, torch.arange(256))
    arm.module.denoiser.eval()
    with torch.no_grad():
        loss = arm.module.objective(arm.module.denoiser, x, keys, label=batch["label"])["loss"].mean().item()
    arm.module.denoiser.train()
    return loss


@pytest.mark.parametrize("backbone", ["unet_tiny", "dit_tiny"])
def test_training_learns(tmp_path, backbone):
    arm, run = arm_and_run(tmp_path, f"backbone={backbone}", "training.max_steps=60", "data.batch_size=32")
    before = held_out_loss(arm)
    execute(arm, run, Console(file=io.StringIO()), None)
    assert held_out_loss(arm) < 0.8 * before
    losses = [float(row["loss"]) for row in metrics_of(run)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.parametrize("checkpoint", [1, 100])
def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path, checkpoint):
    # whether it is the log or the checkpoint that comes first
    overrides = ["optimizer.lr=1e30", "training.max_steps=8", "log_every_n_steps=4"]
    with pytest.raises(DiffxError, match="lower optimizer") as stop:
        trained(tmp_path, *overrides, f"checkpoint.every_n_steps={checkpoint}")
    assert "\n" not in str(stop.value)
    (listed,) = [json.loads(line) for file in tmp_path.glob("*/*/*/nonfinite.jsonl") for line in file.open()]
    step = listed["step"]
    assert step == listed["first"] // 8 and listed["samples"] == [8 * step, 8 * step + 7]
    assert f"since step {step} (first in sample {listed['first']};" in str(stop.value)
    (file,) = tmp_path.glob("*/*/*/status.json")
    run = Run(file.parent)
    assert run.status() == {"state": "failed", "reason": str(stop.value)}
    assert not run.weights.exists()
    for saved in run.checkpoints.glob("*"):
        state = torch.load(saved, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


# ---- the learning rate ----


def rates(choice, steps, **overrides):
    extra = {"total_steps": 100} if choice in ("linear", "cosine") else {}
    schedule = part("lr_schedule", choice, **extra, **overrides)
    return [schedule(step) for step in steps]


@pytest.mark.parametrize("choice", choices("lr_schedule"))
def test_warm_up_rises_linearly_and_never_stands_at_zero(choice):
    plain, warm = rates(choice, range(8)), rates(choice, range(8), warmup_steps=4)
    assert [w / p for w, p in zip(warm, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert all(0 < rate <= 1 for rate in warm)


def test_learning_rates_have_the_values_of_their_formulas():
    assert rates("constant", (0, 10, 10**6)) == [1, 1, 1]
    assert rates("linear", (0, 25, 50, 100, 200)) == [1, 0.75, 0.5, 0, 0]
    assert rates("cosine", (0, 50, 100, 200)) == pytest.approx([1, 0.5, 0, 0], abs=1e-12)
    assert rates("cosine", (100 / 3,)) == pytest.approx([0.75])
    assert rates("inverse_sqrt", (0, 70000, 280000)) == [1, 1, 0.5]
    assert rates("inverse_sqrt", (0, 1, 16), t_ref=4) == [1, 1, 0.5]


def test_the_optimizer_follows_the_schedule(tmp_path):
    used = []
    arm, run = arm_and_run(tmp_path, "lr_schedule=cosine", "lr_schedule.warmup_steps=2", "training.max_steps=4")
    make = arm.module.make_optimizer

    def spied(parameters):
        optimizer = make(parameters)
        optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
        return optimizer

    arm.module.make_optimizer = spied
    execute(arm, run, Console(file=io.StringIO()), None)
    base = arm.config["optimizer"]["lr"]
    expected = [min(1, (k + 1) / 2) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert used == pytest.approx([base * factor for factor in expected])


# ---- the log ----


def bin_name(logsnr):
    edges = [f"{edge:g}" for edge in LOGSNR_EDGES]
    for k, edge in enumerate(LOGSNR_EDGES):
        if logsnr <= edge:
            return f"loss/logsnr<{edges[0]}" if k == 0 else f"loss/logsnr{edges[k - 1]}..{edges[k]}"
    return f"loss/logsnr>{edges[-1]}"


def test_the_log_holds_the_means_of_its_windows(tmp_path):
    arm, run = arm_and_run(
        tmp_path, "trainer.accumulate_grad_batches=2", "log_every_n_steps=4", "training.gradient_clip_val=0.5"
    )
    seen, norms, clipped = [], [], []
    step = arm.module.training_step

    def spied(batch, batch_idx):
        out = step(batch, batch_idx)
        seen.append(list(zip(out["logsnr"].tolist(), out["losses"].tolist(), strict=True)))
        return out

    def norm(module):
        return torch.stack([p.grad.norm() for p in module.denoiser.parameters()]).norm().item()

    arm.module.training_step = spied
    arm.module.on_before_optimizer_step = lambda optimizer: norms.append(norm(arm.module))
    after_each_batch(arm, lambda module, count: clipped.append(norm(module)) if count % 2 == 0 else None)
    execute(arm, run, Console(file=io.StringIO()), None)

    rows = metrics_of(run)
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    flops = training_flops(arm.module, next(iter(arm.source.train_loader(0))))
    for k, row in enumerate(rows):
        # the first call was to count its operations
        window = [pair for micro in seen[1 + 8 * k : 1 + 8 * (k + 1)] for pair in micro]
        assert len(window) == 4 * 8
        by_bin = defaultdict(list)
        for logsnr, loss in window:
            by_bin[bin_name(logsnr)].append(loss)
        expected = {name: sum(losses) / len(losses) for name, losses in by_bin.items()}
        expected["loss"] = sum(loss for _, loss in window) / len(window)
        expected["images"] = 8 * 4 * (k + 1)
        expected["grad_norm"] = norms[4 * (k + 1) - 1]
        logged = {name: float(value) for name, value in row.items() if value and name not in ("step", "lr")}
        assert logged.pop("flops") / logged["images"] == flops
        assert logged == pytest.approx(expected, rel=1e-5)
        assert sum(len(losses) for losses in by_bin.values()) == 32 and len(by_bin) > 1
    # the norm that is logged is the one before clipping
    assert max(norms) > 0.6 and max(clipped) <= 0.5001


def test_without_clipping_there_is_no_norm(tmp_path):
    _, _, run = trained(tmp_path, "training.gradient_clip_val=null", "training.max_steps=1")
    assert "grad_norm" not in metrics_of(run)[0]


def test_csv_appends_and_takes_new_columns(tmp_path):
    file = tmp_path / "metrics.csv"
    logger = CSVLogger(file)
    logger.log_metrics({"loss": 1.5}, step=1)
    assert file.read_text() == "step,loss\n1,1.5\n"
    logger.log_metrics({"loss": 1.0, "a,b": 2.0}, step=2)
    logger.log_metrics({"a,b": 3.0}, step=3)
    assert file.read_text() == 'step,loss,"a,b"\n1,1.5,\n2,1.0,2.0\n3,,3.0\n'
    assert logger.rows()[0] == {"step": "1", "loss": "1.5", "a,b": ""}


def test_csv_resumes_where_the_checkpoint_stands(tmp_path):
    file = tmp_path / "metrics.csv"
    before = CSVLogger(file)
    for step in (1, 2, 3, 4):
        before.log_metrics({"loss": step}, step=step)
    with file.open("a") as half:
        half.write("5,")  # killed while writing
    after = CSVLogger(file)
    after.resume(2)
    assert file.read_text() == "step,loss\n1,1\n2,2\n"
    after.log_metrics({"loss": 30, "new": 1}, step=3)
    assert file.read_text() == "step,loss,new\n1,1,\n2,2,\n3,30,1\n"
    CSVLogger(tmp_path / "absent.csv").resume(5)
    assert not (tmp_path / "absent.csv").exists()


def test_csv_resumed_beyond_its_last_row_is_unchanged(tmp_path):
    file = tmp_path / "metrics.csv"
    CSVLogger(file).log_metrics({"loss": 1.0}, step=1)
    text = file.read_text()
    logger = CSVLogger(file)
    logger.resume(7)
    assert file.read_text() == text
    logger.log_metrics({"loss": 2.0}, step=8)
    assert file.read_text() == text + "8,2.0\n"


# ---- two processes ----


class Recording(Objective):
    """Denoising that writes down every sample it trains on, and stops its rank at `$STOP`, given as rank:step."""

    def __init__(self, time_sampler, weighting):
        super().__init__()
        self.inner = Denoising(time_sampler, weighting)

    def forward(self, denoiser, x, keys, **cond):
        entered = []
        hook = denoiser.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append((args[0].detach(), kwargs["label"])), with_kwargs=True
        )
        terms = self.inner(denoiser, x, keys, **cond)
        hook.remove()
        ((network_input, label),) = entered
        t, _ = self.inner.time_sampler(denoiser.schedule, keys)
        z = keys.normal("noise", *x.shape[1:], dtype=x.dtype)
        rank, step = dist.get_rank() if dist.is_initialized() else 0, keys.index[0].item() // keys.total
        file = Path(os.environ["RECORDS"]) / f"{step}-{keys.index[0].item()}-{rank}.pt"
        torch.save({"index": keys.index, "t": t, "z": z, "label": label, "x": x, "input": network_input}, file)
        if os.environ.get("STOP") == f"{rank}:{step}":
            os.kill(os.getpid(), signal.SIGUSR1)
        return terms


def records_of(folder):
    """What each global sample was trained with, in the order of the samples."""
    parts = [torch.load(file, weights_only=True) for file in folder.iterdir()]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = together["index"].argsort()
    return {name: value[order] for name, value in together.items()}


def test_two_processes_train_what_one_trains(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    overrides = [
        *ROUNDING,
        "objective._target_=test_training.Recording",
        "log_every_n_steps=4",
        "evaluation.every_n_steps=3",
        "evaluation.interim_samples=30",
        "evaluation.num_samples=30",
        "extractor=digits",
        "conditioning.dropout=0.5",
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RECORDS", str(tmp_path / "one"))
    code, _, one = trained(tmp_path / "runs1", *overrides)
    assert code == 0

    # one rank is told to stop: both do, and the same command goes on
    monkeypatch.setenv("RECORDS", str(tmp_path / "two"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config, words = composed(tmp_path / "runs2", *overrides, "trainer.devices=2")
    two = locate(config["runs_dir"], config, words)
    monkeypatch.setenv("STOP", "1:1")
    assert train(config, words) == 128 + signal.SIGUSR1
    # they hear of it one step later
    assert two.status() == {"state": "interrupted", "step": 3, "signal": signal.SIGUSR1}
    monkeypatch.delenv("STOP")
    assert train(config, words) == 0
    assert two.status() == {"state": "finished", "step": 6}

    expected, actual = records_of(tmp_path / "one"), records_of(tmp_path / "two")
    assert expected["index"].tolist() == list(range(48)) and actual["index"].equal(expected["index"])
    for name in ("t", "z", "label", "x"):
        assert actual[name].equal(expected[name]), name
    assert (expected["label"] == 10).any() and (expected["label"] < 10).any()
    torch.testing.assert_close(actual["input"], expected["input"], rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "two").iterdir())) == 12  # half of each batch

    assert_close_weights(two, one)
    rows, expected_rows = metrics_of(two), metrics_of(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, reference in zip(rows, expected_rows, strict=True):
        assert row.keys() == reference.keys()
        for name, value in reference.items():
            assert (row[name] == "") == (value == ""), name
            # a pixel that is rounded the other way moves the metrics of so few images
            tolerance = 1e-2 if name.startswith(("eval", "final")) else 1e-4
            assert value == "" or float(row[name]) == pytest.approx(float(value), rel=tolerance, abs=1e-6), name
    assert sorted(p.name for p in two.samples.iterdir()) == sorted(p.name for p in one.samples.iterdir())
    (evaluation,), (reference,) = (list(run.evaluations.iterdir()) for run in (two, one))
    assert evaluation.name == reference.name


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(tmp_path):
    config, words = composed(tmp_path, "trainer.devices=3")
    with pytest.raises(DiffxError, match=r"data\.batch_size=6 or 9"):
        train(config, words)
    assert not list(tmp_path.iterdir())
