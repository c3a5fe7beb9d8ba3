"""Launching on SLURM, as far as it can be seen without one: scripts, ledger, what is done when a process ends."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import TINY

from diffx.cli import main as cli
from diffx.cli.jobs import duration, states
from diffx.experiment import Run, find_runs
from diffx.launch import Ledger, Slurm, scheduler, supervise
from diffx.launch.code import snapshot
from diffx.launch.slurm import batch_script
from diffx.launch.templates import templates
from diffx.utils import DiffxError

ROOT = Path(__file__).parent.parent


def program(folder, name, text):
    """An executable that stands for one of SLURM's."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport os, sys, json, pathlib\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that note how they were called, and answer from files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        answer = folder / f"{name}.answer"
        program(
            folder,
            name,
            f"with open({str(folder / 'calls')!r}, 'a') as f: print({name!r}, *sys.argv[1:], file=f)\n"
            f"a = pathlib.Path({str(answer)!r})\n"
            "print(a.read_text() if a.exists() else '', end='')",
        )
    (folder / "sbatch.answer").write_text("42\n")
    for name in [key for key in os.environ if key.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(slurm, name):
    file = slurm / "calls"
    rows = file.read_text().splitlines() if file.is_file() else []
    return [row.partition(" ")[2] for row in rows if row.split(" ")[0] == name]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


# ---- the batch script ----


def test_the_templates_are_those_in_the_repository_and_valid():
    written = {file.name: file.read_text() for file in (ROOT / "slurm").iterdir()}
    assert written == templates(), "python -m diffx.launch.templates slurm"
    for text in written.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=USR1@120" in text
        assert '"$@"' in text or '"$1"' in text


def test_a_script_says_what_was_asked_and_leaves_the_rest_to_the_cluster():
    text = batch_script(
        ["about"],
        Slurm(gpus=4, nodes=2, time="1-12", account="my lab", sbatch=["--exclusive"]).directives(4, output="a b.log"),
        ["module load cuda"],
        "exec true",
    )
    lines = text.splitlines()
    assert lines[:2] == ["#!/bin/bash", "# about"] and lines[-2:] == ["module load cuda", "exec true"]
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gres=gpu:4",
        "--time=1-12",
        "--account='my lab'",
        "--exclusive",
    ):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --output='a b.log'" in lines
    assert not any("partition" in line or "qos" in line for line in lines)
    assert not any("gres" in line for line in Slurm(gpus=0).directives(2))
    assert "--gres=gpu:a100:4" in Slurm(gpus=4, gres="gpu:a100:4").directives(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": -1}, "launcher.gpus is -1; set it to 0 or more"),
        ({"nodes": 0}, "launcher.nodes is 0; set it to 1 or more"),
        ({"retries": -1}, "launcher.retries is -1"),
        ({"signal": "KILL@10"}, "launcher.signal is 'KILL@10'; write SIGNAL@SECONDS"),
        ({"signal": "B:USR1@10"}, "would reach the batch script alone"),
        ({"sbatch": ["exclusive"]}, "launcher.sbatch holds 'exclusive'"),
        ({"gres": "gpu:a100:4"}, "launcher.gres=gpu:a100:4 asks for other than launcher.gpus=1"),
    ],
)
def test_what_is_impossible_is_said_at_once(settings, message):
    with pytest.raises(DiffxError, match=message):
        Slurm(**settings)


# ---- submitting ----


def test_a_sweep_is_submitted_as_one_array_and_not_twice(capsys, tmp_path, slurm):
    sweep = [*TINY, f"runs_dir={tmp_path}/runs", "schedule=linear,cosine", "seed=0,1"]
    keys = [
        "launcher.gpus=0",
        "launcher.partition=low",
        "launcher.array_parallelism=3",
        "launcher.setup=[module load x]",
    ]
    code, out, _ = run(capsys, "train", "-m", "hydra/launcher=slurm", *keys, *sweep)
    assert code == 0 and "job 42: 4 arms on 1 × 1 CPU processes; no run like these has logged its speed yet" in out
    (call,) = calls(slurm, "sbatch")
    assert call.startswith("--parsable --array=0-3%3 ")
    script = Path(call.split()[-1])
    text = script.read_text()
    assert "#SBATCH --partition=low" in text and "\nmodule load x\n" in text
    arms = (script.parent / "arms.txt").read_text().split()
    runs = find_runs(tmp_path / "runs")
    assert sorted(arms) == sorted(str(run.path) for run in runs) and len(runs) == 4
    for k, path in enumerate(arms):
        assert Ledger(path).job == f"42_{k}"
        assert Run(path).config()["launcher"]["partition"] == "low"
        assert (Path(path) / "launches.jsonl").is_file()
    # the code that will run is the one of now
    assert (script.parent / "code/diffx/diffx/launch/slurm.py").is_file()
    assert f"{script.parent}/code/diffx" in text

    (slurm / "squeue.answer").write_text("".join(f"42_{k}|PENDING|Priority||1:00:00\n" for k in range(3)))
    code, out, _ = run(capsys, "train", "-m", "launcher=slurm", *keys, *sweep)
    assert code == 0 and out.count("already") == 3
    assert "--array" not in calls(slurm, "sbatch")[1]  # the one that is missing
    Run(arms[3]).set_status("finished", step=4)
    code, out, _ = run(capsys, "train", "-m", "launcher=slurm", *keys, *sweep)
    assert out.count("already") == 3 and out.count("is finished") == 1 and len(calls(slurm, "sbatch")) == 2


def test_hours_are_those_of_the_speed_of_earlier_runs(capsys, tmp_path, slurm):
    words = ["launcher=slurm", "launcher.gpus=0", *TINY, f"runs_dir={tmp_path}", "training.max_steps=1000"]
    assert run(capsys, "train", *words, "trainer.devices=2")[0] == 0
    (first,) = find_runs(tmp_path)
    (first.path / "metrics.csv").write_text("step,images_per_second\n1000,10.0\n")
    _, out, _ = run(capsys, "train", "-m", *words, "trainer.devices=2", "seed=1,2")
    # 2 runs of 1000 steps of 16 images at 10 per second, on 2 processes each
    assert f"about {2 * 2 * 1600 / 3600:.2g} process-hours" in out
    assert "no run like these" in run(capsys, "train", *words, "seed=3")[1]


def test_without_sbatch_nothing_is_composed_for_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run(capsys, "train", "launcher=slurm", *TINY, f"runs_dir={tmp_path}/runs")
    assert code == 2 and err.startswith("diffx: there is no sbatch here") and not (tmp_path / "runs").exists()


def test_gpus_and_nodes_are_asked_for_once(capsys, tmp_path, slurm):
    words = ["launcher.gpus=4", "launcher.nodes=2", "data.batch_size=64"]
    code, out, err = run(capsys, "train", "launcher=slurm", *TINY, f"runs_dir={tmp_path}", *words)
    assert code == 0, err
    assert "job 42: 1 arm on 2 × 4 GPUs" in out
    config = find_runs(tmp_path)[0].config()
    assert {key: config["trainer"][key] for key in ("accelerator", "devices", "num_nodes")} == {
        "accelerator": "gpu",
        "devices": 4,
        "num_nodes": 2,
    }
    assert config["data"]["batch_size"] == 64
    code, _, err = run(capsys, "train", "launcher=slurm", *TINY, f"runs_dir={tmp_path}", "launcher.gpus=3")
    assert code == 2 and "cannot be shared evenly by 3 processes" in err


def test_a_refusal_of_sbatch_is_told_and_leaves_nothing(capsys, tmp_path, slurm):
    program(slurm, "sbatch", "print('sbatch: error: invalid partition specified: fast', file=sys.stderr); sys.exit(1)")
    code, _, err = run(capsys, "train", "launcher=slurm", "launcher.gpus=0", *TINY, f"runs_dir={tmp_path}")
    assert code == 2 and "invalid partition specified: fast" in err and err.count("\n") == 1
    assert not list((tmp_path / ".slurm").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.signal=KILL@10"], "launcher.signal is 'KILL@10'; write SIGNAL@SECONDS"),
        (["launcher.gpu=1"], "there is no key 'launcher.gpu' (did you mean 'launcher.gpus'"),
        (["launcher.nodes=0"], "launcher.nodes is 0; set it to 1 or more"),
        (["launcher.sbatch=[exclusive]"], "launcher.sbatch holds 'exclusive'"),
        (["schedule=cosin"], "there is no schedule=cosin (did you mean 'cosine'?)"),
        (["hydra/sweeper=optuna"], "launcher=slurm waits for none"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(capsys, tmp_path, slurm, words, message):
    code, _, err = run(capsys, "train", "-m", "launcher=slurm", *TINY, f"runs_dir={tmp_path}/runs", *words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not calls(slurm, "sbatch") and not (tmp_path / "runs").exists()


def test_outside_a_job_srun_is_refused(capsys, tmp_path, slurm):
    code, _, err = run(capsys, "train", "launcher=srun", *TINY, f"runs_dir={tmp_path}")
    assert code == 2 and "inside a SLURM job only" in err


# ---- the ledger ----


def test_a_line_cut_short_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    ledger = Ledger(tmp_path)
    assert (ledger.events(), ledger.job, ledger.last("started")) == ([], "", {})
    ledger.add("submitted", job="7")
    with ledger.file.open("a") as file:
        file.write('{"event": "star')
    ledger.add("stopped", step=3)
    assert [row["event"] for row in ledger.events()] == ["submitted", "stopped"]
    assert ledger.job == "7" and ledger.last("stopped")["step"] == 3


# ---- inside a job ----


@pytest.fixture
def job(tmp_path, slurm, monkeypatch):
    """A run directory, and srun that does what `$DOES` says in it."""
    found = Run(tmp_path / "runs/digits/default-1/seed0")
    found.freeze({"seed": 0, "name": "digits"})
    found.checkpoints.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    program(
        slurm,
        "srun",
        "import signal\n"
        "run, does = pathlib.Path(sys.argv[-1]), json.loads(os.environ['DOES'])\n"
        "if 'step' in does: (run / 'checkpoints' / f\"step={does['step']:08d}.ckpt\").touch()\n"
        "if 'state' in does: (run / 'status.json').write_text(json.dumps(does['state']))\n"
        "if 'signal' in does: os.kill(os.getpid(), does['signal'])\n"
        "sys.exit(does.get('code', 0))",
    )

    def start(retries=1, **does):
        monkeypatch.setenv("DOES", json.dumps(does))
        return supervise(found, [str(found.path)], 1, (), retries)

    start.run, start.ledger = found, Ledger(found.path)
    return start


def happened(job):
    return [row["event"] for row in job.ledger.events()]


def test_a_finished_run_is_done(job, slurm):
    assert job(state={"state": "finished", "step": 5}, step=5) == 0
    assert happened(job) == ["started", "finished"] and not calls(slurm, "scontrol")


def test_a_stopped_run_is_requeued(job, slurm):
    state = {"state": "interrupted", "step": 5, "signal": int(signal.SIGUSR1)}
    assert job(state=state, step=5, code=138) == 138
    assert happened(job) == ["started", "stopped"]
    assert job.ledger.last("stopped")["signal"] == "SIGUSR1"
    assert "requeue 42" in calls(slurm, "scontrol")


def test_a_rank_that_srun_ends_after_the_first_has_said_why_changes_nothing(job):
    state = {"state": "interrupted", "step": 5, "signal": int(signal.SIGUSR2)}
    assert job(state=state, step=5, code=128 + signal.SIGTERM) == 128 + signal.SIGUSR2
    assert job.ledger.last("stopped")["signal"] == "SIGUSR2"


def test_an_element_of_an_array_requeues_itself_alone(job, slurm, monkeypatch):
    # the last element has the array's own number, by which scontrol would requeue all of them
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "42")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    state = {"state": "interrupted", "step": 5, "signal": int(signal.SIGUSR1)}
    assert job(state=state, step=5, code=138) == 138
    assert "requeue 42_3" in calls(slurm, "scontrol") and "requeue 42" not in calls(slurm, "scontrol")


@pytest.mark.parametrize(
    ("said", "requeued"),
    [
        ("JobState=RUNNING Reason=None RunTime=00:00:03 TimeLimit=00:05:00", True),
        ("JobState=CANCELLED Reason=None", False),
        # while its processes end, a cancelled job is told from one at its limit by its time
        ("JobState=COMPLETING RunTime=00:00:03 TimeLimit=00:05:00", False),
        ("JobState=COMPLETING RunTime=00:00:03 TimeLimit=UNLIMITED", False),
        ("JobState=COMPLETING RunTime=1-00:00:04 TimeLimit=1-00:00:00", True),
    ],
)
def test_a_cancelled_run_is_not(job, slurm, said, requeued):
    (slurm / "scontrol.answer").write_text(f"JobId=42 {said}\n")
    state = {"state": "interrupted", "step": 5, "signal": int(signal.SIGTERM)}
    assert job(state=state, step=5, code=143) == 143
    assert happened(job) == ["started", "stopped"]
    assert ("requeue 42" in calls(slurm, "scontrol")) == requeued


def test_what_fails_for_its_own_reasons_is_not_tried_again(job, slurm):
    assert job(state={"state": "failed", "reason": "the data are corrupt"}, code=2) == 2
    assert happened(job) == ["started", "failed"] and not calls(slurm, "scontrol")
    assert job.ledger.last("failed")["reason"] == "the data are corrupt"


def test_what_dies_is_tried_again_as_long_as_it_gets_further(job, slurm):
    for step in (5, 10, 15):
        assert job(step=step, signal=int(signal.SIGKILL)) == 1
    assert happened(job) == ["started", "died"] * 3
    assert calls(slurm, "scontrol").count("requeue 42") == 3
    assert job(signal=int(signal.SIGKILL)) == 2
    assert happened(job)[-2:] == ["died", "failed"]
    assert "2 starts did not get beyond step 15" in job.run.status()["reason"]
    # submitted once more by its user, it has its tries again
    job.ledger.add("submitted", job="43")
    assert job(code=1) == 1 and calls(slurm, "scontrol").count("requeue 42") == 4
    assert "exit code 1" in job.ledger.last("died")["reason"]


def test_the_word_of_an_earlier_start_is_not_taken_for_this_ones(job):
    state = {"state": "interrupted", "step": 5, "signal": int(signal.SIGUSR1)}
    job(state=state, step=5, code=138)
    assert job(code=1) == 1  # it has crashed before it could say anything
    assert happened(job) == ["started", "stopped", "started", "died"]


def test_signals_are_left_to_the_ranks(job, slurm, monkeypatch):
    # srun sends this process what SLURM sends to all of a job; it must live to requeue
    program(slurm, "srun", "import signal; os.kill(os.getppid(), signal.SIGTERM); sys.exit(143)")
    previous = signal.getsignal(signal.SIGTERM)
    assert job() == 143
    assert happened(job) == ["started", "stopped"]
    assert signal.getsignal(signal.SIGTERM) is previous


def test_outside_a_job_there_is_nothing_to_supervise(job, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(DiffxError, match="inside a SLURM job only"):
        job()


# ---- what has become of the arms ----


@pytest.mark.parametrize(
    ("status", "ledger", "queue", "accounting", "expected"),
    [
        ({}, ["submitted"], "42|PENDING|Priority||", "", ("queued", "Priority")),
        ({"state": "running"}, ["submitted", "started"], "42|RUNNING|None|node1|3:00", "", ("running", "")),
        ({"state": "evaluating"}, ["submitted", "started"], "42|RUNNING|None|node1|3:00", "", ("evaluating", "")),
        ({"state": "finished", "step": 4}, ["submitted"], "", "", ("finished", "")),
        (
            {"state": "running"},
            ["submitted", "started"],
            "",
            "42|OUT_OF_MEMORY|n",
            ("failed", "SLURM says OUT_OF_MEMORY"),
        ),
        (
            {"state": "running"},
            ["submitted", "started"],
            "",
            "42|CANCELLED by 0|n",
            ("cancelled", "SLURM says CANCELLED"),
        ),
        ({"state": "running"}, ["submitted", "started"], "", "", ("killed", "its job has gone")),
        ({"state": "interrupted", "step": 3}, ["submitted", "stopped"], "", "", ("interrupted", "its job has gone")),
        ({"state": "failed", "reason": "x"}, [("failed", "no data")], "", "", ("failed", "no data")),
        ({"state": "running"}, [], "", "", ("killed", "")),
        ({}, [], "", "", ("waiting", "")),
    ],
)
def test_states(tmp_path, slurm, status, ledger, queue, accounting, expected):
    found = Run(tmp_path / "runs/digits/default-1/seed0")
    found.freeze({"training": {"max_steps": 10}, "data": {"batch_size": 4}})
    if status:
        found.set_status(**status)
    for event in ledger:
        name, reason = event if isinstance(event, tuple) else (event, None)
        Ledger(found.path).add(name, job="42", **({"reason": reason} if reason else {}))
    (slurm / "squeue.answer").write_text(queue + "\n" if queue else "")
    (slurm / "sacct.answer").write_text(accounting + "\n" if accounting else "")
    (state,) = states([found])
    assert (state.name, state.reason) == (expected[0], expected[1] or state.reason)


def test_the_time_left_is_that_of_the_speed_last_logged(tmp_path, slurm):
    found = Run(tmp_path / "runs/digits/default-1/seed0")
    found.freeze({"training": {"max_steps": 100}, "data": {"batch_size": 4}})
    found.set_status("running")
    (found.path / "metrics.csv").write_text("step,loss,images_per_second\n40,0.5,2.0\n")
    with found.lock():
        (state,) = states([found])
    assert (state.name, state.step, state.seconds) == ("running", 40, 120)
    assert [duration(s) for s in (None, 40, 720, 11100, 200000)] == ["", "40 s", "12 min", "3 h 05 min", "2 d 7 h"]


def test_jobs_are_listed_cancelled_and_submitted_again(capsys, tmp_path, slurm, monkeypatch):
    keys = ["launcher=slurm", "launcher.gpus=0", *TINY, f"runs_dir={tmp_path}/runs"]
    assert run(capsys, "train", *keys)[0] == 0
    (slurm / "squeue.answer").write_text("42|PENDING|Priority||\n")
    code, out, _ = run(capsys, "jobs", tmp_path / "runs")
    assert code == 0 and "1 queued" in out and "Priority" in out
    assert run(capsys, "jobs", tmp_path / "runs", "--resubmit")[1].startswith("nothing to submit")
    code, out, _ = run(capsys, "jobs", tmp_path / "runs", "--cancel")
    assert code == 0 and calls(slurm, "scancel") == ["42"]
    (slurm / "squeue.answer").write_text("")
    assert "1 cancelled" in run(capsys, "jobs", tmp_path / "runs")[1]
    code, out, _ = run(capsys, "jobs", tmp_path / "runs", "--resubmit", "launcher.mem=64G")
    assert code == 0 and len(calls(slurm, "sbatch")) == 2
    assert "#SBATCH --mem=64G" in Path(calls(slurm, "sbatch")[1].split()[-1]).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["--resubmitt"], "there is no option '--resubmitt' .did you mean '--resubmit'"),
        (["launcher.mem=64G"], "add --resubmit"),
        (["."], "there are no runs in '.'"),
    ],
)
def test_mistakes_about_jobs(capsys, tmp_path, monkeypatch, words, message):
    import re

    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "jobs", *words)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


# ---- the code that runs ----


def test_the_snapshot_holds_what_git_tracks_and_new_code(tmp_path):
    project = tmp_path / "project"
    (project / "pkg").mkdir(parents=True)
    for name, text in {"pkg/a.py": "A = 1", "new.py": "N = 1", "data.bin": "x", ".gitignore": "ignored.py"}.items():
        (project / name).write_text(text)
    (project / "ignored.py").write_text("I = 1")
    for command in (["init", "-q"], ["add", "pkg"]):
        subprocess.run(["git", "-C", str(project), *command], check=True)
    paths = snapshot(tmp_path / "code", project)
    copied = {str(file.relative_to(paths[-1])) for file in paths[-1].rglob("*") if file.is_file()}
    assert copied == {"pkg/a.py", "new.py"}
    assert (paths[0] / "diffx/launch/code.py").is_file() and (paths[0] / "configs/train.yaml").is_file()


def test_a_project_full_of_data_is_refused(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    with (project / "weights.py").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(DiffxError, match=r"is 65 MiB; keep data out of git, or set launcher.snapshot=false"):
        snapshot(tmp_path / "code", project)


def test_ids_that_slurm_has_forgotten_do_not_hide_the_others(slurm):
    program(
        slurm,
        "squeue",
        "jobs = next(a for a in sys.argv if a.startswith('--jobs=')).removeprefix('--jobs=').split(',')\n"
        "if '1' in jobs: sys.exit('slurm_load_jobs error: Invalid job id specified')\n"
        "for j in jobs: print(f'{j}|RUNNING|None|node1|1:00')",
    )
    assert set(scheduler.queue(["1", "2", "3_4"])) == {"2", "3"}
