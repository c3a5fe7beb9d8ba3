"""On a real SLURM: arms are submitted, preempted, lose their node, are cancelled, and finish exactly once."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, events, state, step

from diffx.training.checkpoint_files import read_checkpoint

TIMES = {"images_per_second", "eval/seconds", "data_wait", "device_seconds"}


def checkpoint(run):
    file = max(run.glob("checkpoints/step=*.ckpt"))
    return read_checkpoint(file)


def flat(value, prefix=""):
    """All leaves of nested dicts and lists, by their paths."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same(run, reference):
    """Weights, EMA, optimizer and the history of metrics, bit for bit."""
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "training_log"):
        actual, expected = flat(checkpoint(run)[key]), flat(checkpoint(reference)[key])
        assert actual.keys() == expected.keys()
        for path, value in expected.items():
            same = value.equal(actual[path]) if isinstance(value, torch.Tensor) else value == actual[path]
            assert same, f"{run}: {key}{path}"
    assert (run / "weights/ema.safetensors").read_bytes() == (reference / "weights/ema.safetensors").read_bytes()
    histories = []
    for folder in (run, reference):
        with (folder / "metrics.csv").open(newline="") as file:
            histories.append([{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)])
    assert histories[0] == histories[1], run
    names = [sorted(file.name for file in folder.glob("evaluations/*.json")) for folder in (run, reference)]
    assert names[0] == names[1] and len(names[0]) == 1


def test_every_arm_of_a_sweep_finishes_once_whatever_happens(login, cluster, tmp_path):
    arms = [
        "schedule=linear,cosine",
        "parameterization=eps,v",
        "seed=0,1",
        "training.max_steps=500",
        "evaluation.every_n_steps=150",
    ]
    # what the weights would have been, one arm after the other in one process
    login.diffx("train", "-m", *TINY, *arms, f"runs_dir={tmp_path}/undisturbed")

    said = login.submit(*arms, launcher=["launcher.partition=low"])
    runs = login.runs()
    assert len(runs) == 8 and "8 arms on 1 × 1 CPU processes" in said
    assert not any(state(run) == "finished" for run in runs)  # the command has not waited
    assert len({events(run, "submitted")[0]["job"] for run in runs}) == 8
    login.wait(lambda: all(step(run) >= 40 for run in runs), "all arms in training")

    # a job of higher priority takes one node, with half of the arms on it
    there = [run for run in runs if events(run, "started")[-1]["node"] == "node1"]
    assert 2 <= len(there) <= 6
    login("sbatch", "-p", "high", "-w", "node1", "--exclusive", "--wrap", "sleep 20")
    login.wait(lambda: all(events(run, "stopped") for run in there), "the arms on node1 preempted")
    # one job is cancelled by its user, by SLURM's own command
    victim = there[0]
    job = events(victim, "submitted")[0]["job"]
    # until it is back in the queue, SLURM answers that it has ended already
    login.wait(lambda: re.search("JobState=(PENDING|RUNNING).*Restarts=1", login.job(job)), "the victim requeued")
    login("scancel", job)
    # the other node is lost
    elsewhere = [run for run in runs if run not in there and state(run) != "finished"]
    assert elsewhere
    cluster.kill_node("node2")
    login.wait(lambda: "down" in login("sinfo", "-h", "-n", "node2", "-o", "%T"), "SLURM to miss node2", 120)
    login.wait(lambda: all(len(events(run, "started")) > 1 for run in elsewhere), "its arms started again")
    cluster.start_node("node2")

    # the sweep once more: what is finished, queued or running is left alone
    said = login.submit(*arms, launcher=["launcher.partition=low"])
    assert said.count("already") + said.count("is finished") == 7
    assert [run for run in runs if len(events(run, "submitted")) > 1] == [victim]
    login.wait(lambda: all(events(run, "finished") for run in runs), "all arms finished")
    login.wait(login.idle, "an empty queue")
    for run in runs:
        assert len(events(run, "finished")) == 1, run
        (reference,) = (tmp_path / "undisturbed").glob(f"*/*{run.parent.name.rpartition('-')[2]}/{run.name}")
        assert_same(run, reference)
    table = login.diffx("jobs")
    assert "8 finished" in table
    assert login.submit(*arms).count("is finished") == 8  # and nothing is submitted


def test_two_nodes_train_what_one_trains(login, tmp_path):
    arm = ["training.max_steps=120", "evaluation.every_n_steps=0", "evaluation.num_samples=0"]
    login.diffx("train", *TINY, *arms_alone(arm), f"runs_dir={tmp_path}/alone")
    login.submit(*arm, launcher=["launcher.nodes=2", "launcher.signal=USR2@60"])
    (run,) = login.runs()
    login.wait(lambda: step(run) >= 40, "training")
    login("scancel", "-s", "USR2", events(run, "submitted")[0]["job"])
    login.wait(lambda: events(run, "finished"), "the arm finished")
    assert [row["signal"] for row in events(run, "stopped")] == ["SIGUSR2"]
    assert len(events(run, "started")) == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["trainer"]["num_nodes"], config["trainer"]["devices"]) == (2, 1)
    (alone,) = (tmp_path / "alone").glob("*/*/seed0")
    ours, theirs = checkpoint(run)["state_dict"], checkpoint(alone)["state_dict"]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


def arms_alone(overrides):
    return [word for word in overrides if "," not in word]


DEADLY = """
import os, signal
from diffx.objectives import Denoising


class Deadly(Denoising):
    \"\"\"Dies as if out of memory at a step; or, of another kind, has a loss that is NaN.\"\"\"

    def forward(self, denoiser, x, keys, **cond):
        step = keys.index[0].item() // keys.total
        if step == 50 and os.environ.get("KIND") != "nan":
            os.kill(os.getpid(), signal.SIGKILL)
        terms = super().forward(denoiser, x, keys, **cond)
        if step == 50:
            terms["loss"] = terms["loss"] * float("nan")
        return terms
"""


def test_what_cannot_get_further_is_given_up_with_its_reason(login):
    (login.folder / "mine.py").write_text(DEADLY)
    arm = ["objective._target_=mine.Deadly", "training.max_steps=100"]
    login.submit(*arm, launcher=["launcher.retries=1"])
    (run,) = login.runs()
    login.wait(lambda: events(run, "failed"), "the arm given up")
    assert state(run) == "failed"
    died = events(run, "died")
    assert [row["step"] for row in died] == [40, 40] and "SIGKILL" in died[0]["reason"]
    assert "2 starts did not get beyond step 40" in events(run, "failed")[0]["reason"]
    table = login.diffx("jobs", "runs/digits")
    assert "1 failed" in table and "SIGKILL" in table

    # a loss that is not finite is the arm's own fault: it is not tried again
    login.environment["KIND"] = "nan"
    login.diffx("jobs", "--resubmit", "launcher.retries=3")
    login.wait(lambda: len(events(run, "failed")) == 2, "the arm given up again")
    assert "not finite since step 50" in events(run, "failed")[1]["reason"]
    assert len(events(run, "died")) == 2
    assert "not finite" in login.diffx("jobs", "--log")


def test_a_queued_job_does_not_see_later_edits(login):
    (login.folder / "mine.py").write_text(
        "from diffx.objectives import Denoising\n\nclass Mine(Denoising):\n    pass\n"
    )
    login("git", "init", "-q")
    login.submit(
        "objective._target_=mine.Mine",
        "training.max_steps=40",
        "evaluation.num_samples=0",
        launcher=["launcher.sbatch=[--hold]"],
    )
    (run,) = login.runs()
    assert "queued" in login.diffx("jobs")
    (login.folder / "mine.py").write_text("raise RuntimeError('edited meanwhile')\n")
    login("scontrol", "release", events(run, "submitted")[0]["job"])
    login.wait(login.finished, "the arm finished")


def test_a_job_near_its_time_limit_saves_and_goes_on(login):
    # SLURM looks at limits every half minute, and the signal must not come before the first step
    login.submit(
        "training.max_steps=100000",
        "evaluation.every_n_steps=0",
        launcher=["launcher.time=2", "launcher.signal=USR1@30"],
    )
    (run,) = login.runs()
    login.wait(lambda: events(run, "stopped"), "the signal before the limit", 300)
    # SLURM may be late with the first, and then it is the one at the limit
    assert events(run, "stopped")[0]["signal"] in ("SIGUSR1", "SIGTERM")
    login.wait(lambda: len(events(run, "started")) > 1, "the second start", 120)
    assert events(run, "started")[1]["step"] == events(run, "stopped")[0]["step"] > 0
    assert re.search("1 (running|queued)", login.diffx("jobs"))
    login.diffx("jobs", "--cancel")
    login.wait(login.idle, "an empty queue", 120)
    assert "1 cancelled" in login.diffx("jobs")
    kinds = [row["event"] for row in events(run)]
    assert "started" not in kinds[kinds.index("cancelled") :]  # the signal of the cancellation is no preemption


@pytest.mark.parametrize("template", ["one_gpu", "array"])
def test_the_templates_run_as_they_are(login, template):
    shutil.copytree(ROOT / "slurm", login.folder / "slurm")
    (login.folder / ".venv").symlink_to(ROOT / ".venv")
    arm = [*TINY, "training.max_steps=400", "evaluation.num_samples=0"]
    options = ["--gres=none", "--cpus-per-task=1", "--parsable"]
    if template == "array":
        (login.folder / "arms.txt").write_text(" ".join([*arm, "seed=0"]) + "\n" + " ".join([*arm, "seed=1"]) + "\n")
        job = login("sbatch", *options, "--array=1-2%2", "slurm/array.sbatch", "arms.txt").strip()
    else:
        job = login("sbatch", *options, "slurm/one_gpu.sbatch", *arm).strip()
    count = 2 if template == "array" else 1
    login.wait(lambda: [step(run) >= 40 for run in login.runs()] == [True] * count, "training")
    login("scancel", "-s", "USR1", job)
    login.wait(lambda: [state(run) == "finished" for run in login.runs()] == [True] * count, "all finished")
    login.wait(login.idle, "an empty queue")
    for run in login.runs():
        assert [row["event"] for row in events(run)] == ["started", "stopped", "started", "finished"]


def test_the_chain_measures_when_training_has_finished(login):
    shutil.copytree(ROOT / "slurm", login.folder / "slurm")
    (login.folder / ".venv").symlink_to(ROOT / ".venv")
    options = ["--gres=none", "--cpus-per-task=1", "--parsable"]
    arm = [*TINY, "training.max_steps=40", "evaluation.num_samples=0"]
    job = login("sbatch", *options, "slurm/one_gpu.sbatch", *arm).strip()
    measure = ["run=runs/digits/*/seed*", "sampler=ddim,euler", "evaluation.num_samples=40"]
    login("sbatch", *options, f"--dependency=afterok:{job}", "slurm/evaluate.sbatch", *measure)
    login.wait(lambda: len(list(login.folder.glob("runs/*/*/*/evaluations/*.json"))) == 2, "both measured")


def test_a_cluster_without_accounting_and_waiting_for_the_end(login):
    login.environment["PATH"] = hide(login, "sacct")
    said = login.submit("training.max_steps=40", "seed=0,1", launcher=["launcher.wait=true"])
    assert "2 finished" in said
    login.submit("training.max_steps=40", "seed=2", launcher=["launcher.sbatch=[--hold]"])
    login.diffx("jobs", "--cancel")
    assert "1 cancelled" in login.diffx("jobs")


def hide(login, program):
    """A search path on which everything but a program is found."""
    folder = login.folder / "programs"
    folder.mkdir()
    for place in reversed(login.environment["PATH"].split(":")):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
    (folder / program).unlink()
    return str(folder)


def test_the_doctor_asks_a_compute_node_too(login):
    said = login.diffx("doctor", "launcher=slurm", "launcher.gpus=0", "launcher.cpus_per_task=1", *TINY)
    assert "node1 (compute node)" in said or "node2 (compute node)" in said
    assert "low*: 2 nodes idle" in said and "versions" in said and "clocks" in said
    assert "all is well" in said


def test_what_slurm_refuses_is_told_in_a_sentence(login):
    words = ["launcher=slurm", "launcher.gpus=0", "launcher.partition=fast", *TINY, "training.max_steps=2"]
    said = login.diffx("train", *words, code=2)
    assert re.search("sbatch refuses: .*invalid partition", said) and said.count("\n") == 1
    assert login("squeue", "-h") == ""


def test_the_ecosystems_plugin_survives_preemption_too(login):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    arm = [*TINY, "training.max_steps=400", "evaluation.num_samples=0", "seed=0"]
    keys = ["timeout_min=10", "signal_delay_s=60", "partition=low"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffx.cli.main", "train", "-m", "hydra/launcher=submitit_slurm"]
        + [f"hydra.launcher.{key}" for key in keys]
        + arm,
        cwd=login.folder,
        env=login.environment,
    )
    login.wait(lambda: login.runs() and step(login.runs()[0]) >= 40, "training")
    (run,) = login.runs()
    job = login("squeue", "-h", "-o", "%A").split()[0]
    login("scancel", "-s", "USR2", job)
    login.wait(lambda: state(run) == "interrupted", "saved")
    login.wait(login.finished, "the arm finished")
    assert process.wait(120) == 0
