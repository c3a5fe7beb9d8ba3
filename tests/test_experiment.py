"""A run is found again by what it is, and what it writes is whole or absent."""

import copy
import errno
import json
import os
import re
import subprocess

import pytest
import torch
import yaml

from diffx.cli.budget import set_steps
from diffx.cli.compose import compose_config
from diffx.experiment import Record, Run, fingerprint, identity, is_identity, locate
from diffx.experiment.record import command_line
from diffx.experiment.run import step_of
from diffx.training.checkpoints import AtomicCheckpointIO
from diffx.utils import DiffxError, atomic_path, write_text

CONFIG = {
    "name": "exp",
    "seed": 0,
    "data": {"_target_": "diffx.data.Digits", "batch_size": 64, "num_workers": 0},
    "schedule": {"_target_": "diffx.schedules.Cosine", "s": 0.008},
    "training": {"max_steps": 10},
    "trainer": {"devices": 1},
    "runs_dir": "runs",
}


def config_of(*overrides):
    return compose_config("train", list(overrides), [], set_steps)


# ---- identity ----

HOW = [
    "trainer=cpu",
    "trainer.devices=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.compile=true",
    "logger=wandb",
    "runs_dir=elsewhere",
    "checkpoint.every_n_steps=7",
    "log_every_n_steps=7",
    "progress_bar=false",
    "data.num_workers=3",
]
INFERENCE = [
    "sampler=ddpm",
    "sampler.steps=3",
    "discretization=uniform",
    "guidance=cfg",
    "thresholding=none",
    "extractor=none",
    "evaluation.num_samples=5",
    "evaluation.seed=5",
    "evaluation.every_n_steps=5",
]
IDENTITY = [
    "schedule=linear",
    "parameterization=eps",
    "weighting=snr",
    "time_sampler=uniform",
    "backbone=unet_tiny",
    "backbone.dropout=0.2",
    "conditioning.dropout=0.3",
    "optimizer.lr=1e-3",
    "lr_schedule=cosine",
    "ema.decay=0.5",
    "data.batch_size=32",
    "data.flip=true",
    "training.max_steps=5",
    "training.precision=bf16-mixed",
    "training.gradient_clip_val=2",
]


@pytest.mark.parametrize("override", [*HOW, *INFERENCE, "seed=3"])
def test_how_it_runs_and_what_is_asked_later_is_not_what_it_is(override):
    assert config_of(override) != config_of()
    assert fingerprint(identity(config_of(override))) == fingerprint(identity(config_of()))
    assert not is_identity(override.partition("=")[0])


@pytest.mark.parametrize("override", IDENTITY)
def test_what_decides_the_weights_is_what_it_is(override):
    assert fingerprint(identity(config_of(override))) != fingerprint(identity(config_of()))
    assert is_identity(override.partition("=")[0])


def test_every_key_of_a_config_is_either_identity_or_not():
    # a new group is identity until it is said to be none: runs are rather kept apart than mixed
    config = config_of()
    kept = identity(config)
    assert set(kept) < set(config)
    assert all(is_identity(key) for key in kept)
    assert not any(is_identity(key) for key in set(config) - set(kept))
    assert identity({**config, "novelty": {"a": 1}}) != kept


@pytest.mark.parametrize(
    ("key", "expected"),
    [("+schedule.new", True), ("~ema", True), ("hydra/launcher", False), ("hydra.job.name", False), ("data", True),
     ("data.root", False), ("data.root.x", False), ("data.rooted", True), ("experiment", False)],
)  # fmt: skip
def test_keys_as_they_are_typed(key, expected):
    assert is_identity(key) is expected


def test_identity_leaves_the_config_alone():
    config = copy.deepcopy(CONFIG)
    identity(config)
    assert config == CONFIG


def test_fingerprints_are_stable_and_blind_to_order():
    # the value itself: a change of the function would orphan every run
    assert fingerprint({"b": [1, 2.5, None], "a": {"y": True, "x": "é"}}) == "464107421a"
    assert fingerprint({"a": {"x": "é", "y": True}, "b": [1, 2.5, None]}) == "464107421a"
    assert fingerprint({"b": [2.5, 1, None], "a": {"y": True, "x": "é"}}) != "464107421a"
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(1, 16)) and fingerprint(1, 16).startswith(fingerprint(1, 10))


# ---- where a run lives ----


def test_the_path_says_what_was_overridden(tmp_path):
    overrides = ["schedule=cosine", "seed=3", "parameterization=v", "trainer=cpu", "sampler.steps=5", "name=exp"]
    config = config_of(*overrides)
    run = locate(tmp_path, config, overrides)
    assert run.path.parent.parent == tmp_path / "exp" and run.path.name == "seed3"
    digest = fingerprint(identity(config))
    assert run.path.parent.name == f"parameterization=v,schedule=cosine-{digest}"
    assert locate(tmp_path, config_of(), []).path.parent.name == f"default-{fingerprint(identity(config_of()))}"


def test_an_existing_run_is_found_however_it_is_typed(tmp_path):
    first = ["schedule=linear", "parameterization=eps"]
    run = locate(tmp_path, config_of(*first), first)
    run.freeze(config_of(*first))
    for words in (first[::-1], [*first, "schedule.beta_max=20"], [*first, "trainer=cpu", "sampler=ddpm"]):
        assert locate(tmp_path, config_of(*words), words).path == run.path
    other = [*first, "seed=1"]
    assert locate(tmp_path, config_of(*other), other).path == run.path.parent / "seed1"
    for words in (first[:1], [*first, "schedule.beta_max=10"]):
        assert locate(tmp_path, config_of(*words), words).path.parent != run.path.parent


def test_paths_are_short_and_plain(tmp_path):
    words = ["data.name='a b/c'", *(f"+ema.key_number_{k}=[1,2,{{a:b}}]" for k in range(20))]
    name = locate(tmp_path, CONFIG, words).path.parent.name
    assert re.fullmatch(r"[A-Za-z0-9_.,=-]+", name) and len(name) <= 91


def test_a_run_of_another_config_is_not_overwritten(tmp_path):
    run = Run(tmp_path / "seed0")
    run.freeze(CONFIG)
    text = run.config_file.read_text()
    other = copy.deepcopy(CONFIG)
    other["schedule"]["s"] = 0.01
    with pytest.raises(DiffxError, match=r"holds a run of another config; delete or rename") as refusal:
        run.freeze(other)
    assert str(run.path) in str(refusal.value) and run.config_file.read_text() == text
    moved = copy.deepcopy(CONFIG) | {"trainer": {"devices": 2}, "runs_dir": "elsewhere"}
    run.freeze(moved)
    assert run.config() == moved


def test_a_frozen_config_is_read_as_it_was(tmp_path):
    config = config_of("optimizer.lr=1e-5", "lr_schedule=cosine", "logger=wandb")
    run = Run(tmp_path)
    run.freeze(config)
    assert run.config() == config
    assert fingerprint(identity(run.config())) == fingerprint(identity(config))
    # in the order of the config, for its reader
    assert list(yaml.safe_load(run.config_file.read_text())) == list(config)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is no run directory"), ("a: [", "is no valid YAML"), ("", "is empty")]
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, text, message):
    run = Run(tmp_path)
    if text is not None:
        run.config_file.write_text(text)
    with pytest.raises(DiffxError, match=message) as refusal:
        run.config()
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_status(tmp_path):
    run = Run(tmp_path)
    assert (run.state, run.status()) == ("absent", {})
    run.set_status("failed", step=3, reason="the disk is full")
    assert run.state == "failed"
    assert Run(tmp_path).status() == {"state": "failed", "step": 3, "reason": "the disk is full"}
    run.set_status("finished", step=5)
    assert run.status() == {"state": "finished", "step": 5}
    (tmp_path / "status.json").write_text('{"state": "fin')
    assert run.state == "absent"


def test_the_newest_whole_checkpoint(tmp_path):
    run = Run(tmp_path)
    assert run.newest_checkpoint() == (None, [])
    run.checkpoints.mkdir()
    files = {step: run.checkpoints / f"step={step:08d}.ckpt" for step in (5, 20, 100, 123456789)}
    for file in files.values():
        torch.save({"weights": torch.zeros(100)}, file)
    (run.checkpoints / ".step=00000200.abc.tmp.ckpt").write_bytes(b"half")
    assert run.newest_checkpoint() == (files[123456789], [])
    for step in (123456789, 100):
        files[step].write_bytes(files[step].read_bytes()[:-30])
    assert run.newest_checkpoint() == (files[20], [files[123456789], files[100]])
    assert [step_of(file) for file in files.values()] == list(files)
    assert step_of(run.checkpoints / "last.ckpt") == -1


def test_one_process_trains_in_a_directory(tmp_path):
    run = Run(tmp_path / "seed0")
    for _ in range(2):  # an exception gives the lock back
        with pytest.raises(KeyError), run.lock():
            with pytest.raises(DiffxError, match="another process is training in") as refusal, Run(run.path).lock():
                pass
            assert str(run.path) in str(refusal.value)
            with Run(tmp_path / "seed1").lock():
                pass
            raise KeyError


# ---- the record of a launch ----


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, as working directory."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name, value in (("GIT_CONFIG_GLOBAL", os.devnull), ("GIT_CONFIG_SYSTEM", os.devnull)):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    (folder / "a.txt").write_text("one\n")
    for command in (
        ["init", "-q"],
        ["add", "a.txt"],
        ["-c", "user.name=n", "-c", "user.email=e@example.com", "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *command], check=True)
    return folder


def test_a_launch_is_recorded_with_commit_and_packages(repository, tmp_path):
    run = tmp_path / "run"
    Record.now(["diffx", "train", "seed=1"]).append_to(run)
    (launch,) = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert launch["commit"] == head and launch["dirty"] is False
    assert launch["command"] == "diffx train seed=1"
    assert launch["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert all(launch["packages"][name] != "absent" for name in ("lightning", "numpy", "diffx"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", launch["time"])
    assert launch["host"] and launch["python"].startswith("3.")
    assert not (run / "diff.patch").exists()


def test_uncommitted_changes_are_kept(repository, tmp_path):
    run = tmp_path / "run"
    (repository / "a.txt").write_text("two\n")
    for seed in (0, 1):
        Record.now(["diffx", f"seed={seed}"]).append_to(run)
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert [launch["command"] for launch in launches] == ["diffx seed=0", "diffx seed=1"]
    assert all(launch["dirty"] for launch in launches)
    # the patch makes the code of the run from its commit
    subprocess.run(["git", "checkout", "-q", "a.txt"], check=True)
    subprocess.run(["git", "apply", str(run / "diff.patch")], check=True)
    assert (repository / "a.txt").read_text() == "two\n"


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    record = Record.now([])
    assert (record.commit, record.dirty) == ("", False)
    monkeypatch.setenv("PATH", "")  # nor is git needed
    assert Record.now([]).commit == ""


def test_the_command_line_is_told_without_paths(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/diffx", "train", "seed=1"])
    assert command_line() == ["diffx", "train", "seed=1"]


# ---- whole files ----


def test_an_exception_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(KeyError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "a.json"
    write_text(file, "old")
    if where == "sync":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "rename":
        monkeypatch.setattr("pathlib.Path.replace", full)
    failing = pytest.raises(DiffxError, match="No space left on device; free some space")
    with failing as failure, atomic_path(file) as temporary:
        temporary.write_text("new")
        if where == "write":
            full()
    assert str(file) in str(failure.value) and "\n" not in str(failure.value)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffxError, match="cannot write"):
        write_text(tmp_path / "file" / "a.json", "text")


def test_a_new_file_appears_whole_and_readable(tmp_path):
    file = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(file) as temporary:
        temporary.write_text("text")
        assert not file.exists() and temporary.parent == file.parent and temporary.suffix == ".txt"
    assert file.read_text() == "text" and list(file.parent.iterdir()) == [file]
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file, io = tmp_path / "step=00000001.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.ones(3)}, file)

    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:1] PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiffxError, match=r"cannot write the checkpoint .*; free some space"):
        io.save_checkpoint({"a": torch.zeros(3)}, file)
    assert list(tmp_path.iterdir()) == [file]
    assert io.load_checkpoint(file)["a"].tolist() == [1, 1, 1]


def test_a_whole_number_is_the_same_value_as_a_float():
    assert fingerprint({"lr": 1, "betas": [1, 0.5]}) == fingerprint({"lr": 1.0, "betas": [1.0, 0.5]})
    assert fingerprint({"lr": 1}) != fingerprint({"lr": 2})
