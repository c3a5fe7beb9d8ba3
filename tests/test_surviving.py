"""What training lives through: signals in an evaluation, steps that are not finite, a file system that is away."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_training import assert_same_training, checkpoint_of, metrics_of, trained

from diffx.evaluation import Evaluator
from diffx.objectives import Denoising, Objective
from diffx.training.loggers import CSVLogger
from diffx.utils import DiffxError, atomic_path, files, patiently, write_text

torch.set_num_threads(1)

MEASURED = [
    "extractor=digits",
    "metrics=[fd,is]",
    "evaluation.every_n_steps=4",
    "evaluation.interim_samples=90",
    "evaluation.batch_size=30",
]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- an evaluation in training is stopped, and goes on ----


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return trained(tmp_path_factory.mktemp("undisturbed"), *MEASURED)[2]


@pytest.mark.parametrize("batches", [(1,), (2,), (1, 1), (1, 4)])
def test_an_evaluation_in_training_is_stopped_at_a_batch_and_taken_up_again(
    tmp_path, monkeypatch, undisturbed, batches
):
    # (1, 1): stopped again in the evaluation that was to be taken up; (1, 4): and in the next one, two batches on
    original = Evaluator.__call__
    for stop_at in batches:
        count = 0

        def stopping(self, *args, stop_at=stop_at, **kwargs):
            def on_batch(done):
                nonlocal count
                count += 1
                if count == stop_at:
                    os.kill(os.getpid(), signal.SIGUSR1)

            return original(self, *args, on_batch=on_batch, **kwargs)

        monkeypatch.setattr(Evaluator, "__call__", stopping)
        code, _, run = trained(tmp_path, *MEASURED)
        assert code == 128 + signal.SIGUSR1
        assert len(list(run.samples.glob(".*.partial.safetensors"))) == 1
        assert run.status()["step"] == (8 if stop_at == 4 else 4)
    monkeypatch.setattr(Evaluator, "__call__", original)
    code, _, run = trained(tmp_path, *MEASURED)
    assert code == 0
    assert_same_training(run, undisturbed)
    assert not list(run.samples.glob(".*"))
    assert [row["eval/fd_digits"] for row in metrics_of(run) if row["eval/fd_digits"]]


@pytest.mark.parametrize("rows", [["eval/a"], ["final/a", "final/b"]])
def test_what_is_done_again_at_the_step_of_the_checkpoint_is_logged_once(tmp_path, rows):
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=3)
    logger.log_metrics({"loss": 0.9}, step=4)
    logger.log_metrics(dict.fromkeys(rows, 5.0), step=4)
    before = logger.rows()
    again = CSVLogger(tmp_path / "metrics.csv")
    again.resume(4)
    again.log_metrics(dict.fromkeys(rows, 5.0), step=4)
    assert again.rows() == before
    again.log_metrics(dict.fromkeys(rows, 4.0), step=5)
    assert len(again.rows()) == len(before) + 1


def test_a_signal_in_the_last_step_stops_the_evaluation_that_follows(tmp_path):
    def ask(module, count):
        if count == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    final = ["extractor=digits", "metrics=[fd]", "evaluation.num_samples=90", "evaluation.batch_size=30"]
    code, _, run = trained(tmp_path, *final, action=ask)
    assert code == 128 + signal.SIGTERM
    assert run.status() == {"state": "interrupted", "step": 12, "signal": signal.SIGTERM}
    assert list(run.evaluations.glob("*.partial.safetensors"))
    code, _, run = trained(tmp_path, *final)
    assert code == 0 and run.state == "finished"
    assert len(list(run.evaluations.glob("*.json"))) == 1


# ---- steps that are not finite ----


class Broken(Objective):
    """Denoising whose loss is NaN for some samples, or whose gradient alone is infinite at some steps."""

    samples: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    def __init__(self, time_sampler, weighting):
        super().__init__()
        self.inner = Denoising(time_sampler, weighting)

    def forward(self, denoiser, x, keys, **cond):
        terms = self.inner(denoiser, x, keys, **cond)
        bad = torch.isin(keys.index, torch.tensor(self.samples, dtype=torch.int64))
        terms["loss"] = terms["loss"].where(~bad, torch.nan)
        if keys.index[0].item() // keys.total in self.steps:
            terms["loss"].register_hook(lambda gradient: gradient * torch.inf)
        return terms


BROKEN = ["objective._target_=test_surviving.Broken", "training.max_steps=6"]


def listed(run):
    return [json.loads(line) for line in (run.path / "nonfinite.jsonl").open()]


@pytest.fixture
def broken(monkeypatch):
    import test_surviving  # as Hydra finds it, which may be another copy than this one

    monkeypatch.setattr(test_surviving.Broken, "samples", (19,))
    monkeypatch.setattr(test_surviving.Broken, "steps", (4,))


def test_skipped_steps_leave_the_weights_alone_and_are_listed(tmp_path, broken):
    states = {}

    def remember(module, count):
        states[count] = {name: value.clone() for name, value in module.denoiser.state_dict().items()}

    code, _, run = trained(tmp_path, *BROKEN, "training.nonfinite=skip", action=remember)
    assert code == 0
    for step, other in ((3, 2), (5, 4)):
        assert all(states[step][name].equal(value) for name, value in states[other].items()), step
    for step, other in ((2, 1), (4, 3), (6, 5)):
        assert any(not states[step][name].equal(value) for name, value in states[other].items()), step
    assert listed(run) == [
        {"step": 2, "first": 19, "samples": [16, 23]},
        {"step": 4, "first": 32, "samples": [32, 39]},
    ]
    losses = [row["loss"] for row in metrics_of(run)]
    assert len(losses) == 6 and "nan" not in losses
    # of an optimizer step that was left out nothing is counted
    (moments,) = {int(state["step"]) for state in checkpoint_of(run)["optimizer_states"][0]["state"].values()}
    assert moments == 4


def test_too_many_in_a_row_stop_all_the_same(tmp_path, broken, monkeypatch):
    import test_surviving

    monkeypatch.setattr(test_surviving.Broken, "samples", tuple(range(8, 1000)))
    with pytest.raises(DiffxError, match=r"11 steps in a row, the last of them step 11, .* train anew"):
        trained(tmp_path, *BROKEN, "training.nonfinite=skip", "training.max_steps=40")


@pytest.mark.parametrize(("samples", "steps", "first"), [((19,), (), 19), ((), (4,), 32)])
def test_a_bad_sample_or_gradient_is_named(tmp_path, broken, monkeypatch, samples, steps, first):
    import test_surviving

    monkeypatch.setattr(test_surviving.Broken, "samples", samples)
    monkeypatch.setattr(test_surviving.Broken, "steps", steps)
    with pytest.raises(
        DiffxError, match=f"since step {first // 8} .first in sample {first}; .*training.nonfinite=skip"
    ):
        trained(tmp_path, *BROKEN, "log_every_n_steps=3")
    (file,) = tmp_path.glob("*/*/*/nonfinite.jsonl")
    assert json.loads(file.read_text())["first"] == first


# ---- a file system that is away for a while ----


def failing(times, number):
    def write():
        write.calls += 1
        if write.calls <= times:
            raise OSError(number, os.strerror(number))

    write.calls = 0
    return write


def test_writing_is_tried_again_while_the_file_system_is_away():
    write = failing(3, errno.ESTALE)
    with pytest.warns(UserWarning, match="trying again"):
        patiently(write, seconds=60, pause=0.001)
    assert write.calls == 4


def test_a_full_disk_is_no_reason_to_wait():
    write = failing(1, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        patiently(write, seconds=60, pause=0.001)
    assert write.calls == 1


def test_patience_ends():
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(OSError, match="Input/output"):
        patiently(failing(10**6, errno.EIO), seconds=0.02, pause=0.001)


def test_a_run_lives_through_a_file_system_that_is_away(tmp_path, monkeypatch):
    # every file of the run is refused twice before it is written
    refused = {}
    original = files.tempfile.mkstemp

    def away(*args, prefix="", dir=None, **kwargs):
        key = f"{dir}/{prefix}"
        if "step=" in prefix or "status" in prefix or "metrics" in prefix or "ema" in prefix:
            refused[key] = refused.get(key, 0) + 1
            if refused[key] <= 2:
                raise OSError(errno.EIO, "Input/output error")
        return original(*args, prefix=prefix, dir=dir, **kwargs)

    monkeypatch.setattr(files.tempfile, "mkstemp", away)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.warns(UserWarning, match="trying again"):
        code, _, run = trained(tmp_path, "evaluation.every_n_steps=5")
    assert code == 0 and run.state == "finished"
    assert any("step=00000005" in key for key in refused) and any("ema" in key for key in refused)
    assert run.newest_checkpoint(verify=True)[0].name == "step=00000012.ckpt"


def test_renamed_files_are_synced_with_their_folder(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    assert [synced[0].parent, synced[1]] == [tmp_path] * 2


def test_the_newest_row_of_a_long_log_is_read_from_its_end(tmp_path):
    from diffx.experiment import Run

    rows = [f"{step},{step / 7},{100 + step}" for step in range(5000)]
    text = "\n".join(["step,loss,images_per_second", *rows, "4999,0.5,", "5000,0.2"])
    write_text(tmp_path / "metrics.csv", text)
    assert Run(tmp_path).latest() == {"step": 4999, "loss": 4999 / 7, "images_per_second": 5099}
    assert Run(tmp_path / "absent").latest() == {}
