"""Training from shards: the samples of the uninterrupted run, in its order, whatever is killed and resumed."""

import csv
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_shards import encoded, source, write_members, write_shard

from diffx.autoencoders import Pixels
from diffx.cli.budget import set_steps
from diffx.cli.build import build
from diffx.cli.compose import compose_config
from diffx.cli.rank import main as rank_main
from diffx.cli.train import train
from diffx.experiment import locate
from diffx.experiment.run import step_of
from diffx.objectives import Denoising, Objective
from diffx.utils.signals import SIGNALS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:sample replaced")
STEPS, BATCH = 20, 8
SHARDS = [5, 1, 11]  # fewer than ranks, and the passes end in the midst of steps


class Recording(Objective):
    """Denoising that writes down what it trains on, and sends `$SIGNAL` to itself at sample `$AT`."""

    def __init__(self, time_sampler, weighting):
        super().__init__()
        self.inner = Denoising(time_sampler, weighting)

    def forward(self, denoiser, x, keys, **cond):
        rank = dist.get_rank() if dist.is_initialized() else 0
        record = {"index": keys.index, "x": x, "label": cond["label"]}
        torch.save(record, Path(os.environ["RECORDS"]) / f"{keys.index[0].item()}-{rank}.pt")
        if int(os.environ.get("AT", "-1")) in keys.index.tolist():
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return self.inner(denoiser, x, keys, **cond)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def shards(tmp_path):
    first = 0
    for k, count in enumerate(SHARDS):
        write_shard(tmp_path / "shards" / f"{k}.tar", range(first, first + count))
        first += count
    return tmp_path / "shards"


def words_of(tmp_path, shards, *overrides):
    return [
        "data=webdataset",
        f"data.shards={shards}",
        "data.image_size=8",
        "data.num_classes=5",
        "data.test_fraction=0.0",
        "data.shuffle_shards=2",
        f"data.batch_size={BATCH}",
        "backbone=unet_tiny",
        "conditioning.dropout=0.0",
        "trainer=cpu",
        "extractor=none",
        "metrics=[fd]",
        f"training.max_steps={STEPS}",
        "evaluation.every_n_steps=0",
        "evaluation.interim_samples=0",
        "evaluation.num_samples=0",
        "evaluation.per_class=1",
        "sampler.steps=2",
        "checkpoint.every_n_steps=3",
        "log_every_n_steps=5",
        "progress_bar=false",
        f"runs_dir={tmp_path / 'runs'}",
        *overrides,
    ]


def run_of(words):
    config = compose_config("train", words, [], set_steps)
    return locate(config["runs_dir"], config, words)


def train_on(words, processes, workers, monkeypatch, folder, number=0, at=-1):
    """One attempt at the run; what it trained on goes to a folder of its own."""
    folder.mkdir()
    for name, value in (("RECORDS", folder), ("SIGNAL", int(number)), ("AT", at)):
        monkeypatch.setenv(name, str(value))
    words = [*words, f"data.num_workers={workers}", f"trainer.devices={processes}"]
    config = compose_config("train", words, [], set_steps)
    return train(config, words)


def records_of(folder):
    """What an attempt trained on, by sample number."""
    found = {}
    for file in folder.iterdir():
        record = torch.load(file, weights_only=True)
        for k, n in enumerate(record["index"].tolist()):
            assert n not in found, "a sample was given to two ranks"
            found[n] = record["x"][k], record["label"][k]
    return found


def expected_records(shards):
    """What the uninterrupted run trains on, by one process and no worker."""
    loader, found = iter(source(shards, flip=True).train_loader(0)), {}
    for _ in range(STEPS):
        batch = next(loader)
        x = Pixels().encode(batch)
        found |= {n: (x[k], batch["label"][k]) for k, n in enumerate(batch["index"].tolist())}
    assert list(found) == list(range(STEPS * BATCH))
    return found


def forked(arguments, count):
    """What `launch` does, with processes that need not import everything again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
                os.closerange(3, 1024)  # the lock of the run is not theirs
                environment = {"WORLD_SIZE": count, "NODE_RANK": 0, "LOCAL_RANK": rank, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
                sys.argv = arguments[1:]
                rank_main()
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(70)
        children.append(child)
    first, status = os.wait()
    codes = [os.waitstatus_to_exitcode(status)]
    for child in children:
        if child != first:
            if codes[0] and not 128 <= codes[0] < 192:
                os.kill(child, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return max(code if code >= 0 else 128 - code for code in codes)


ATTEMPTS = {
    "asked to stop": [(2, 2, signal.SIGTERM), (1, 3, 0)],
    "killed": [(4, 1, signal.SIGKILL), (2, 3, signal.SIGKILL), (1, 0, 0)],
}


@pytest.mark.parametrize("how", list(ATTEMPTS))
def test_killed_and_resumed_elsewhere_trains_on_the_same_samples(tmp_path, shards, monkeypatch, how):
    words = words_of(tmp_path, shards, "objective._target_=test_shards_training.Recording")
    if how == "killed":  # the other one starts its processes as everybody does
        monkeypatch.setattr("diffx.cli.train.launch", forked)
    run, expected = run_of(words), expected_records(shards)
    draw, start, seen = random.Random(how), 0, {}
    for k, (processes, workers, number) in enumerate(ATTEMPTS[how]):
        # a sample that any of the ranks may have, past the next checkpoint
        at = draw.randrange((start + 4) * BATCH, (start + 7) * BATCH) if number else -1
        folder = tmp_path / f"attempt{k}"
        code = train_on(words, processes, workers, monkeypatch, folder, number, at)
        found = records_of(folder)
        # an attempt goes on where the one before has saved, and leaves nothing out
        assert sorted(found) == list(range(start * BATCH, start * BATCH + len(found)))
        if number:
            assert code == 128 + number and at in found
            step = run.status()["step"] if number == signal.SIGTERM else None
            checkpoint, _ = run.newest_checkpoint()
            newest = step_of(checkpoint) if checkpoint else 0  # killed before the first was on disk
            assert newest == step if step else newest % 3 == 0
            start = newest
            assert start * BATCH <= len(found) + min(found)
        seen |= found
    assert code == 0 and run.state == "finished"
    assert sorted(seen) == list(expected)
    for k in range(len(ATTEMPTS[how])):  # samples that were repeated after a kill are the same too
        for n, (x, label) in records_of(tmp_path / f"attempt{k}").items():
            assert x.equal(expected[n][0]) and label == expected[n][1], n


def test_training_from_shards_holds_shards_out_and_logs_its_reading(tmp_path):
    for k in range(1, 4):
        write_shard(tmp_path / "s" / f"{k}.tar", range(30 * k, 30 * k + 30))
    images = [(f"{k:06d}.png", encoded(k)[: 40 if k == 7 else None]) for k in range(30)]
    write_members(tmp_path / "s" / "0.tar", [*images, *((f"{k:06d}.cls", b"0") for k in range(30))])
    held_out = f"data.test_shards={tmp_path}/s/3.tar"
    words = words_of(tmp_path, tmp_path / "s", held_out, "data.num_workers=1", "data.max_skipped=0.1")
    config = compose_config("train", words, [], set_steps)
    splits = build(config).source.split
    assert (len(splits("train")), len(splits("test"))) == (90, 30)
    assert train(config, words) == 0
    with (run_of(words).path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(0 <= float(row["data_wait"]) <= 1 for row in rows)
    # 160 samples are one pass over 90 and most of the next: the broken sample is met once or twice
    assert sum(float(row.get("data_replaced") or 0) for row in rows) in (1, 2)


def test_samples_measured_against_shards(tmp_path):
    write_shard(tmp_path / "s" / "0.tar", range(60))
    words = [
        *words_of(tmp_path, tmp_path / "s", "data.channels=1", "data.num_workers=1"),
        "data.test_fraction=0.3",
        "training.max_steps=2",
        "evaluation.num_samples=20",
        "evaluation.reference=test",
        "extractor=digits",
    ]
    config = compose_config("train", words, [], set_steps)
    assert train(config, words) == 0
    (record,) = run_of(words).evaluations.iterdir()
    assert '"split": "test"' in record.read_text() or "test" in record.read_text()
