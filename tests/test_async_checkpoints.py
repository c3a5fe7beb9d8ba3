"""Checkpoints written beside training: the state of their moment, whole or absent, alone and in shards."""

import errno
import io
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from test_shards_training import forked
from test_training import after_each_batch, arm_and_run, assert_identical, checkpoint_of, composed, trained

from diffx.cli.build import build
from diffx.cli.execute import execute
from diffx.cli.train import train
from diffx.experiment import Run, locate
from diffx.training.checkpoint_files import (
    dealt,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    shards_of,
    tensors_of,
)
from diffx.training.checkpoint_snapshot import Snapshot
from diffx.training.checkpoint_thread import Background
from diffx.training.checkpoints import Checkpoints
from diffx.training.fit import fit
from diffx.training.weights import load_weights
from diffx.utils import DiffxError
from diffx.utils.signals import SIGNALS, StopSignal

torch.set_num_threads(1)
SHORT = ["training.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep_last=10", "optimizer.lr=0.01"]
TWO = [*SHORT, "trainer.devices=2"]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def on_save(monkeypatch, action):
    """Calls `action(path)` in the writing thread, before anything is written."""
    save = torch.save

    def saving(content, path, *arguments, **settings):
        action(Path(path))
        return save(content, path, *arguments, **settings)

    monkeypatch.setattr(torch, "save", saving)


def is_of(path, step, kind="step"):
    return path.name.startswith(f".{kind}={step:08d}")


# ---- one process ----


def test_what_is_written_is_the_moment_of_the_save(tmp_path, monkeypatch):
    _, _, reference = trained(tmp_path / "reference", *SHORT)
    released, seen = threading.Event(), []
    on_save(monkeypatch, lambda path: is_of(path, 3) and released.wait())

    def release(module, count):
        if count == 5:  # two steps later, none of it is there
            seen.extend(module.trainer.callbacks[-1].directory.glob("step=*"))
            released.set()

    _, _, run = trained(tmp_path / "run", *SHORT, action=release)
    assert not seen
    for step in (3, 6):
        actual, expected = checkpoint_of(run, step), checkpoint_of(reference, step)
        for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops", "training_log"):
            assert_identical(actual[key], expected[key], key)


def test_one_is_written_at_a_time_and_the_older_goes_after_the_newer_is_there(tmp_path, monkeypatch):
    released, events = threading.Event(), []

    def hold(path):
        events.append((path.name[1:14], [name[:13] for name in names(path.parent) if name.startswith("step=")]))
        if is_of(path, 2):
            released.wait()

    wait = Checkpoints.wait

    def waiting(self):
        released.set()  # not before the next save
        wait(self)

    on_save(monkeypatch, hold)
    monkeypatch.setattr(Checkpoints, "wait", waiting)
    _, _, run = trained(tmp_path, "training.max_steps=6", "checkpoint.every_n_steps=2", "checkpoint.keep_last=1")
    first, second, third = ("step=00000002", "step=00000004", "step=00000006")
    assert events == [(first, []), (second, [first]), (third, [second])]
    assert names(run.checkpoints) == [f"{third}.ckpt"]


@pytest.mark.parametrize("step", [3, 6])
def test_an_error_of_the_write_ends_training(tmp_path, monkeypatch, step):
    def fail(path):
        if is_of(path, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_save(monkeypatch, fail)
    done = []

    def note(module, count):
        done.append(count)
        thread = module.trainer.callbacks[-1]._writing._thread
        if thread is not None:  # it has failed by the next batch
            thread.join()

    with pytest.raises(DiffxError, match=r"cannot write .*No space left.*; free some space") as refusal:
        trained(tmp_path, *SHORT, action=note)
    assert len(done) == (3 if step == 3 else 6)  # the error comes up at the end of the next batch
    (file,) = tmp_path.glob("*/*/*/status.json")
    run = Run(file.parent)
    assert run.status() == {"state": "failed", "reason": str(refusal.value)}
    assert names(run.checkpoints) == ["step=00000003.ckpt"] * (step == 6)


def test_an_error_of_the_write_is_told_beside_another(tmp_path, monkeypatch):
    released = threading.Event()

    def fail(path):
        released.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def die(module, count):
        if count == 4:
            raise MemoryError

    on_save(monkeypatch, fail)
    monkeypatch.setattr(Checkpoints, "on_exception", _releasing(released, Checkpoints.on_exception))
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="No space left"):
        trained(tmp_path, *SHORT, action=die)


def _releasing(released, function):
    def releasing(*arguments):
        released.set()
        return function(*arguments)

    return releasing


def test_a_write_under_way_is_ended_when_training_fails(tmp_path, monkeypatch):
    def die(module, count):
        if count == 4:
            raise MemoryError

    released = threading.Event()
    on_save(monkeypatch, lambda path: released.wait())
    monkeypatch.setattr(Checkpoints, "on_exception", _releasing(released, Checkpoints.on_exception))
    with pytest.raises(MemoryError):
        trained(tmp_path, *SHORT, action=die)
    (folder,) = tmp_path.glob("*/*/*/checkpoints")
    assert names(folder) == ["step=00000003.ckpt"]


def test_a_signal_waits_for_the_disk(tmp_path, monkeypatch):
    released, ended = threading.Event(), []
    on_save(monkeypatch, lambda path: released.wait())
    end = Checkpoints.on_train_end

    def ending(self, *arguments):
        released.set()
        end(self, *arguments)
        ended.append(names(self.directory))

    monkeypatch.setattr(Checkpoints, "on_train_end", ending)

    def ask(module, count):
        if count == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    code, _, _ = trained(tmp_path, *SHORT, action=ask)
    assert code == 128 + signal.SIGTERM and ended == [["step=00000002.ckpt"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    arm, run = arm_and_run(tmp_path, *SHORT, "training.nonfinite=skip")
    update = arm.module.ema.update

    def spoiled(denoiser, n):
        update(denoiser, n)
        if n == 3:
            next(arm.module.ema.parameters()).view(-1)[0] = value

    arm.module.ema.update = spoiled
    with pytest.raises(DiffxError, match=r"the weights are not finite at step 3 and are not saved; lower optimizer.lr"):
        execute(arm, run, Console(file=io.StringIO()), None)
    assert not list(run.checkpoints.glob("*"))


def test_work_beside_training_keeps_its_error_for_who_waits():
    background, released = Background(), threading.Event()

    def fail():
        released.wait()
        raise DiffxError("full")

    background.start(fail)
    assert not background.failed
    released.set()
    with pytest.raises(DiffxError, match="full"):
        background.start(lambda: None)
    assert not background.failed
    background.wait()


def test_a_snapshot_reuses_its_memory_and_follows_the_shapes():
    snapshot, tensors = Snapshot(), {"a": torch.ones(2, 3), "b": torch.ones(4, 2, 3, 3)}
    tensors["b"] = tensors["b"].to(memory_format=torch.channels_last)
    first = snapshot.take(tensors, {"a"})
    tensors["a"].zero_()
    snapshot.wait()
    assert first["a"].sum() == 6 and first["b"].is_contiguous(memory_format=torch.channels_last)
    again = snapshot.take(tensors, {"a"})
    assert all(again[name].data_ptr() == first[name].data_ptr() for name in tensors) and again["a"].sum() == 0
    grown = snapshot.take({"a": torch.ones(5, dtype=torch.float64)}, set())
    assert grown["a"].shape == (5,) and grown["a"].dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams and page-locked memory")
def test_a_snapshot_of_a_gpu_is_taken_before_the_optimizer_steps():
    snapshot = Snapshot()
    tensors = {name: torch.zeros(64 * 2**20, device="cuda") for name in ("weights", "buffer")}
    for value in (1.0, 2.0, 3.0):
        for tensor in tensors.values():
            tensor.fill_(value)
        copies = snapshot.take(tensors, {"weights"})
        tensors["buffer"].fill_(-1.0)  # the next forward may change it
        snapshot.hold()
        tensors["weights"].fill_(-1.0)  # the optimizer step
        snapshot.wait()
        assert all(copy.is_pinned() and (copy == value).all() for copy in copies.values())


# ---- several ranks ----


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_even(ranks):
    draw = torch.Generator().manual_seed(ranks)
    sizes = {f"w{k}": int(n) for k, n in enumerate(torch.randint(1, 10**6, (50,), generator=draw))}
    shares = dealt(sizes, ranks)
    assert shares == dealt(dict(reversed(sizes.items())), ranks) and shares.keys() == sizes.keys()
    loads = [sum(sizes[name] for name, rank in shares.items() if rank == k) for k in range(ranks)]
    assert max(loads) <= 1.1 * sum(sizes.values()) / ranks
    assert dealt({}, ranks) == {}


def _share(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    checkpoints = Checkpoints(Path(folder), 1, 1, None, "a", StopSignal())
    checkpoints._ranks, checkpoints._rank, checkpoints._group = 2, rank, dist.group.WORLD
    equal = {"a": torch.ones(4), "b": torch.ones(3)}
    assert checkpoints._shares(equal) == {"a": 0, "b": 1}
    # where the state is gathered on the first rank alone, it alone writes
    assert checkpoints._shares({} if rank else equal) == {}
    assert checkpoints._shares({"a": torch.ones(4 + rank)}) == {}
    dist.destroy_process_group()


def test_only_what_all_ranks_hold_is_shared(tmp_path):
    # forked: a spawned process would spend ten seconds on imports
    processes = mp.start_processes(_share, (str(tmp_path),), nprocs=2, join=False, start_method="fork")
    while not processes.join():
        pass


def two_ranks(root, monkeypatch, *overrides):
    """The exit code and the run of a training by two processes."""
    monkeypatch.setattr("diffx.cli.train.launch", forked)
    config, words = composed(root, *TWO, *overrides)
    return train(config, words), locate(config["runs_dir"], config, words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that two processes have trained."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        root = tmp_path_factory.mktemp("finished")
        code, run = two_ranks(root, monkeypatch)
    assert code == 0 and run.state == "finished"
    return root


@pytest.fixture
def pair(finished, tmp_path):
    """A copy of that folder, and the run in it."""
    shutil.copytree(finished, tmp_path / "runs")
    (config,) = (tmp_path / "runs").glob("*/*/*/config.yaml")
    return tmp_path / "runs", Run(config.parent)


def back_to_step_3(run):
    remove_checkpoint(run.checkpoints / "step=00000006.ckpt")
    assert [file.name[:14] for file in sorted(run.checkpoints.iterdir())] == ["shard=00000003"] * 2 + ["step=00000003."]
    run.weights.unlink()
    run.set_status("running", step=3)


def test_two_ranks_write_even_shards_and_any_number_reads_them(pair, monkeypatch):
    root, run = pair
    files = [run.checkpoints / f"step={step:08d}.ckpt" for step in (3, 6)]
    assert all(len(shards_of(file)) == 2 for file in files) and len(names(run.checkpoints)) == 6
    sizes = [shard.stat().st_size for shard in shards_of(files[1])]
    assert max(sizes) < 1.2 * min(sizes) and files[1].stat().st_size < sum(sizes)
    whole = read_checkpoint(files[1])
    assert "shards" not in whole and not any(tensor.is_meta for tensor in tensors_of(whole).values())
    average, step = load_weights(build(run.config()).module.ema, "ema", run.checkpoints, files[1])
    exported, _ = load_weights(build(run.config()).module.ema, "ema", run.weights.parent, None)
    assert step == 6
    assert_identical(average.state_dict(), exported.state_dict())
    # one process goes on
    back_to_step_3(run)
    code, _, run = trained(root, *SHORT)
    assert code == 0 and not shards_of(run.newest_checkpoint()[0])
    for key in ("state_dict", "optimizer_states"):
        alone, both = tensors_of(checkpoint_of(run)[key]), tensors_of(whole[key])
        assert alone.keys() == both.keys()
        for path, expected in both.items():
            torch.testing.assert_close(alone[path], expected, rtol=1e-2, atol=1e-3, msg=path)
    # and two, from where it has been
    back_to_step_3(run)
    code, run = two_ranks(root, monkeypatch)
    assert code == 0
    again = read_checkpoint(run.newest_checkpoint()[0])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "training_log"):
        assert_identical(again[key], whole[key], key)


def test_a_checkpoint_goes_with_its_shards(tmp_path, monkeypatch):
    _, run = two_ranks(tmp_path, monkeypatch, "checkpoint.keep_last=1")
    assert [name[:14] for name in names(run.checkpoints)] == ["shard=00000006"] * 2 + ["step=00000006."]


@pytest.mark.parametrize("damage", ["missing", "cut", "a bit"])
def test_a_damaged_shard_is_a_damaged_checkpoint(pair, capsys, damage):
    root, run = pair
    newest, _ = run.newest_checkpoint()
    shard = shards_of(newest)[1]
    content = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "a bit":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert run.resume_from().name == "step=00000003.ckpt"
    assert f"passing over the damaged checkpoint {newest}" in capsys.readouterr().out
    if damage != "a bit":
        arm, _ = arm_and_run(root, *SHORT)
        with pytest.raises(DiffxError, match=r"the weights 'ema' in .* cannot be loaded"):
            load_weights(arm.module.ema, "ema", run.checkpoints, newest)
        with pytest.raises(DiffxError, match=f"'{newest}' is damaged .*; delete it to resume from the one before"):
            execute(arm, run, Console(file=io.StringIO()), newest)


def test_fsdp_refuses_shards(pair):
    _, run = pair
    settings = {"checkpoints": None, "callbacks": [], "loggers": [], "max_steps": 6, "precision": "32-true"}
    settings |= {"gradient_clip_val": None, "devices": 2, "num_nodes": 1, "accumulate_grad_batches": 1}
    resume = run.newest_checkpoint()[0]
    with pytest.raises(DiffxError, match=r"is in shards, .* trainer\.strategy=auto"):
        fit(None, None, resume=resume, accelerator="gpu", strategy="fsdp", **settings)


def test_killed_between_shard_and_checkpoint_leaves_the_one_before(pair, monkeypatch):
    root, run = pair
    reference = read_checkpoint(run.newest_checkpoint()[0])
    back_to_step_3(run)

    def die(path):
        if is_of(path, 6):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        on_save(patched, die)
        code, _ = two_ranks(root, patched)
    assert code == 128 + signal.SIGKILL
    left = [name for name in names(run.checkpoints) if "00000006" in name]
    assert sum(name.startswith("shard=") for name in left) == 2 and any(name.endswith(".tmp.ckpt") for name in left)
    assert run.newest_checkpoint() == (run.checkpoints / "step=00000003.ckpt", [])
    code, run = two_ranks(root, monkeypatch)
    assert code == 0 and len(names(run.checkpoints)) == 6  # what was left is gone
    assert_identical(read_checkpoint(run.newest_checkpoint()[0])["state_dict"], reference["state_dict"])


@pytest.mark.parametrize("kind", ["shard", "step"])
def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_earlier_one(pair, monkeypatch, capfd, kind):
    root, run = pair
    back_to_step_3(run)
    before = names(run.checkpoints)

    def fail(path):
        if is_of(path, 6, kind) and (kind == "step" or "-2of2-" in path.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        on_save(patched, fail)
        code, _ = two_ranks(root, patched)
    assert code == 2 and "No space left on device; free some space" in capfd.readouterr().err
    assert run.state == "failed" and "No space left on device" in run.status()["reason"]
    assert names(run.checkpoints) == before


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    kept = ["step=00000003.ckpt", "shard=00000003-1of2-aa.ckpt", "other.txt"]
    gone = [".step=00000006.x.tmp.ckpt", ".shard=00000006-1of2-bb.x.tmp.ckpt", "shard=00000006-2of2-bb.ckpt"]
    for name in (*kept, *gone):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_after_each_batch_is_behind_the_checkpoints(tmp_path):
    # what the tests above stand on
    seen = []
    arm, run = arm_and_run(tmp_path, "training.max_steps=1")
    after_each_batch(arm, lambda module, count: seen.append(module.trainer.callbacks[-1]))
    execute(arm, run, Console(file=io.StringIO()), None)
    assert [type(callback) for callback in seen] == [Checkpoints]
