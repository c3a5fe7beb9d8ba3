"""Sweeps on one machine: their order, arms in parallel processes, searches that survive being killed."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import joblib
import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from diffx.cli import main as cli
from diffx.cli import parallel
from diffx.cli.compose import parse, sweep_points
from diffx.cli.optimize import _distribution
from diffx.cli.parallel import Parallel, share
from diffx.experiment import Run, find_runs
from diffx.utils import DiffxError

TINY = [
    "backbone=unet_tiny",
    "data.batch_size=16",
    "training.max_steps=15",
    "lr_schedule.warmup_steps=0",
    "evaluation.num_samples=20",
    "evaluation.interim_samples=20",
    "evaluation.every_n_steps=5",
    "evaluation.per_class=1",
    "metrics=[fd]",
    "sampler.steps=2",
    "checkpoint.every_n_steps=3",
    "log_every_n_steps=5",
    "progress_bar=false",
    "trainer=cpu",
]
UNMEASURED = ["extractor=none", "evaluation.num_samples=0", "evaluation.every_n_steps=0"]
SEARCH = ["train", "-m", "hydra/sweeper=optuna", *TINY]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/digits/optuna.db")


# ----- the order of arms


@pytest.mark.parametrize("where", [0, 1, 2])
def test_all_arms_of_one_seed_come_before_the_next_seed(where):
    words = ["schedule=linear,cosine", "parameterization=eps,v"]
    words.insert(where, "seed=0,1")
    points = sweep_points(words, "train", parse(words))
    assert [point[0] for point in points] == ["seed=0"] * 4 + ["seed=1"] * 4
    arms = [tuple(point[1:]) for point in points]
    assert arms[:4] == arms[4:]
    assert arms[:2] == [("schedule=linear", "parameterization=eps"), ("schedule=linear", "parameterization=v")]


def test_a_sweep_runs_in_that_order(capsys, tmp_path):
    quick = [*TINY, *UNMEASURED, "training.max_steps=1"]
    code, out, err = run(capsys, "train", "-m", "schedule=linear,cosine", "seed=0,1", *quick, f"runs_dir={tmp_path}")
    assert code == 0, err
    found = re.findall(r"\[\d/4\].*seed=(\d).*schedule=(\w+)", out)
    assert found == [("0", "linear"), ("0", "cosine"), ("1", "linear"), ("1", "cosine")]


# ----- hydra/launcher=joblib


def test_every_process_has_gpus_of_its_own():
    assert [list(share(slot, ["0", "1", "2", "3"], 1)) for slot in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    pairs = [["5", "GPU-a"], ["7", "8"], ["5", "GPU-a"]]
    assert [list(share(slot, ["5", "GPU-a", "7", "8"], 2)) for slot in range(3)] == pairs


@pytest.mark.parametrize(
    ("accelerator", "devices", "words", "expected"),
    [
        ("auto", 1, [], (4, ["0", "1", "2", "3"])),  # one per GPU
        ("gpu", 2, [], (2, ["0", "1", "2", "3"])),
        ("auto", 1, ["hydra.launcher.n_jobs=8"], (8, ["0", "1", "2", "3"])),
        ("auto", 1, ["hydra.launcher.n_jobs=-1"], (4, ["0", "1", "2", "3"])),
        ("cpu", 1, [], (6, [])),  # one per core
        ("cpu", 2, [], (3, [])),
        ("cpu", 1, ["hydra.launcher.n_jobs=50"], (20, [])),  # never more than arms
    ],
)
def test_how_many_processes(monkeypatch, accelerator, devices, words, expected):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.setattr(parallel, "visible_gpus", lambda: ["0", "1", "2", "3"])
    configs = [{"trainer": {"accelerator": accelerator, "devices": devices}}] * 20
    found = Parallel.of(["hydra/launcher=joblib", *words], configs, "folder")
    assert (found.processes, found.gpus) == expected
    assert Parallel.of(words, configs, "folder") is None


def test_workers_claim_different_gpus_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def seen(k):  # leaves what it sees, and waits until the other one has
        text = f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['OMP_NUM_THREADS']}"
        (tmp_path / f"{k}.seen").write_text(text)
        while len(list(tmp_path.glob("*.seen"))) < 2:
            pass
        return 0

    how = Parallel(2, ["3", "5"], 1, str(tmp_path))
    tasks = [joblib.delayed(how.worker)(f"[{k}/2]", lambda k=k: seen(k)) for k in range(2)]
    assert joblib.Parallel(n_jobs=2, backend="loky")(tasks) == [0, 0]
    found = sorted(file.read_text().split() for file in tmp_path.glob("*.seen"))
    assert found == [[gpu, str(max(1, joblib.cpu_count() // 2))] for gpu in ("3", "5")]


TWO_AT_ONCE = ["train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY]


def test_arms_in_parallel_processes(capfd, tmp_path):
    words = ["schedule=flow", "parameterization=flow,v,eps", *UNMEASURED, f"runs_dir={tmp_path}"]
    code, out, err = run(capfd, *TWO_AT_ONCE, *words)
    assert code == 2, err
    assert [run.state for run in find_runs(tmp_path)] == ["finished"] * 2
    # an arm that cannot work does not take the others with it, and every line says whose it is
    (line,) = [line for line in out.splitlines() if "undefined" in line]
    assert line.startswith("[3/3] diffx: ")
    assert all(re.match(r"\[[123]/3\] ", line) for line in out.splitlines()), out


def test_a_signal_is_handed_on_and_all_arms_save(capfd, tmp_path):
    ended = threading.Event()

    def ask() -> None:
        while len(list(tmp_path.glob("digits/*/seed0/metrics.csv"))) < 2:
            if ended.is_set():
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    words = ["schedule=linear,cosine", "seed=0,1", *UNMEASURED, "training.max_steps=100000", f"runs_dir={tmp_path}"]
    code, _, _ = run(capfd, *TWO_AT_ONCE, *words)
    ended.set()
    assert code == 128 + signal.SIGTERM
    assert [run.path.name for run in find_runs(tmp_path)] == ["seed0", "seed0"]  # no further arm was begun
    for found in find_runs(tmp_path):
        assert found.state == "interrupted"
        assert found.newest_checkpoint()[0].name == f"step={found.status()['step']:08d}.ckpt"


# ----- hydra/sweeper=optuna: the space


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(0.5,2)", optuna.distributions.FloatDistribution(0.5, 2.0)),
        ("a=tag(log, interval(1e-4,1e-2))", optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)),
        ("a=interval(1,8)", optuna.distributions.FloatDistribution(1, 8)),
        ("a=int(interval(1,8))", optuna.distributions.IntDistribution(1, 8)),
        ("a=tag(log,int(interval(1,64)))", optuna.distributions.IntDistribution(1, 64, log=True)),
        ("a=range(1,10,2)", optuna.distributions.IntDistribution(1, 9, step=2)),
        ("a=range(10,1,-3)", optuna.distributions.IntDistribution(4, 10, step=3)),
        ("a=range(0,1,0.25)", optuna.distributions.FloatDistribution(0.0, 0.75, step=0.25)),
        ("a=x,y", optuna.distributions.CategoricalDistribution(["x", "y"])),
        ("a=choice(1,'b c')", optuna.distributions.CategoricalDistribution(["1", r"b\ c"])),
    ],
)
def test_hydras_sweeps_are_distributions(word, expected):
    (override,) = OverridesParser.create().parse_overrides([word])
    assert _distribution(override) == expected


@pytest.mark.parametrize("word", ["a=interval(2,1)", "a=tag(log,interval(0,1))", "a=range(1,1)"])
def test_an_empty_range_is_refused(word):
    (override,) = OverridesParser.create().parse_overrides([word])
    with pytest.raises(DiffxError, match="no range to search"):
        _distribution(override)


LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to search"),
        (["seed=0,1", LR], "the luckiest one"),
        ([LR, "schedule=linear,cosin"], "did you mean 'cosine'"),
        (["backbone.dropout=choice(0,a)"], "backbone.dropout must be a number"),
        ([LR, "sweeper.n_trials=0"], "sweeper.n_trials is 0"),
        ([LR, "hydra.sweeper.sampler=tpo"], "sweeper.sampler must be"),
        ([LR, "hydra.sweeper.n_trial=3"], "did you mean 'sweeper.n_trials'"),
        ([LR, "+hydra.sweeper.pruner_kwargs.n_startup=3"], "MedianPruner"),
        ([LR, "sweeper.sampler=grid"], "no end on optimizer.lr"),
        ([LR, "evaluation.num_samples=0"], "set evaluation.num_samples"),
        ([LR, "evaluation.interim_samples=0"], "sweeper.pruner=none"),
        ([LR, "trainer.devices=2"], "pruning needs training in one process"),
        ([LR, "hydra/launcher=joblib"], "runs trial after trial"),
        ([LR, "launcher=slurm"], "launcher=slurm waits for none"),
        ([LR, "sweeper.storage=postgres://nowhere"], "correct sweeper.storage"),
    ],
)
def test_what_cannot_be_searched_is_said_at_once(capsys, tmp_path, words, message):
    code, _, err = run(capsys, *SEARCH, *words, f"runs_dir={tmp_path}/runs")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/digits/*/"))


def test_a_search_needs_m(capsys, tmp_path):
    code, _, err = run(capsys, "train", "hydra/sweeper=optuna", *TINY, f"runs_dir={tmp_path}")
    assert code == 2
    assert "add -m" in err


def test_without_optuna_one_sentence_says_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run(capsys, *SEARCH, LR, f"runs_dir={tmp_path}")
    assert code == 2
    assert "pip install 'diffx[optuna]'" in err


# ----- its trials


class Killed(BaseException):
    """A process that ends without a word."""


PRUNING = [
    "optimizer.lr=2e-3,1e-3,1e-7",
    "sweeper.sampler=grid",
    "sweeper.n_trials=9",
    "+sweeper.pruner_kwargs.n_startup_trials=2",
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of three trials that was stopped by a signal, then killed, then left alone; its folder."""
    folder = tmp_path_factory.mktemp("searched")
    report = optuna.Trial.report

    def interrupted(trial, value, step):
        report(trial, value, step)
        if (trial.number, step) == (0, 5):
            os.kill(os.getpid(), signal.SIGTERM)

    def killed(trial, value, step):
        report(trial, value, step)
        if (trial.number, step) == (1, 10):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "report", interrupted)
        with pytest.raises(SystemExit) as stop:
            cli.main([*SEARCH, *PRUNING, f"runs_dir={folder}/runs"])
        assert stop.value.code == 128 + signal.SIGTERM
        patch.setattr(optuna.Trial, "report", killed)
        with pytest.raises(Killed):
            cli.main([*SEARCH, *PRUNING, f"runs_dir={folder}/runs"])
        assert [trial.state.name for trial in study_of(folder / "runs").trials] == ["COMPLETE", "RUNNING", "WAITING"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*SEARCH, *PRUNING, f"runs_dir={folder}/runs"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        cli.main([*SEARCH, *PRUNING, f"runs_dir={folder}/undisturbed"])
    assert stop.value.code == 0
    return folder


def test_a_killed_search_goes_on_as_if_nothing_had_happened(searched):
    there, undisturbed = study_of(searched / "runs"), study_of(searched / "undisturbed")
    assert there.study_name == undisturbed.study_name
    assert [t.params for t in there.trials] == [{"optimizer.lr": lr} for lr in ("0.002", "0.001", "1e-07")]
    for mine, other in zip(there.trials, undisturbed.trials, strict=True):
        assert (mine.state, mine.value, mine.intermediate_values) == (
            other.state,
            other.value,
            other.intermediate_values,
        )
        launches = (Path(mine.user_attrs["run"]) / "launches.jsonl").read_text().splitlines()
        assert len(launches) == (2 if mine.number < 2 else 1)  # finished where it had begun


def test_a_poor_trial_is_stopped_at_once_and_keeps_its_checkpoint(searched):
    poor = study_of(searched / "runs").trials[2]
    assert poor.state.name == "PRUNED"
    assert list(poor.intermediate_values) == [5]
    pruned = Run(poor.user_attrs["run"])
    assert pruned.status() == {"state": "pruned", "step": 5}
    assert pruned.newest_checkpoint()[0].name == "step=00000005.ckpt"
    assert not pruned.weights.exists()
    assert [run.state for run in find_runs(searched / "runs")].count("finished") == 2


def test_a_trial_is_an_ordinary_run(searched, capsys):
    trial = study_of(searched / "runs").trials[0]
    config = yaml.safe_load((Path(trial.user_attrs["run"]) / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 2e-3
    assert config["choices"]["sweeper"] == "basic"
    code, out, err = run(capsys, "train", *TINY, "optimizer.lr=2e-3", f"runs_dir={searched}/runs")
    assert code == 0, err
    assert "isfinished" in "".join(out.split())  # however it was wrapped
    assert f"fd_digits       │ {trial.value:.4g}"[:10] in out


def test_a_search_that_is_done_shows_its_trials(searched, capsys, monkeypatch):
    monkeypatch.setattr("diffx.cli.optimize.train", None)
    code, out, err = run(capsys, *SEARCH, *PRUNING, f"runs_dir={searched}/runs")
    assert code == 0, err
    study = study_of(searched / "runs")
    assert re.search(r"│ +2 │ pruned +│ \S+ at step 5 │ +1e-07 │", out)
    assert f"best: trial {study.best_trial.number}, {study.best_trial.user_attrs['run']}" in out.replace("\n", "")
    assert "fd_digits" in out


def test_a_second_process_is_refused(searched, capsys, monkeypatch):
    from filelock import FileLock

    (file,) = (searched / "runs/digits").glob(".optuna-*.lock")
    with FileLock(file, is_singleton=False):
        code, _, err = run(capsys, *SEARCH, *PRUNING, f"runs_dir={searched}/runs")
    assert code == 2
    assert "another process runs the study" in err


def test_another_search_under_the_same_name_is_refused(searched, capsys):
    name = f"sweeper.study_name={study_of(searched / 'runs').study_name}"
    words = [word for word in PRUNING if not word.startswith("optimizer.lr")]
    code, _, err = run(capsys, *SEARCH, *words, "optimizer.lr=1e-3,2e-3", name, f"runs_dir={searched}/runs")
    assert code == 2
    assert "is of another search" in err


def test_a_metric_that_is_not_measured_ends_the_search(searched, capsys):
    # the runs are there already
    words = ["optimizer.lr=2e-3,1e-3", "sweeper.metric=fd_digit", "sweeper.pruner=none"]
    code, _, err = run(capsys, *SEARCH, *words, f"runs_dir={searched}/runs")
    assert code == 2
    assert "did you mean 'fd_digits'" in err


def test_failed_trials_are_recorded_and_suggestions_never_repeat(capsys, tmp_path):
    words = ["schedule=flow", "parameterization=choice(eps)", "sweeper.pruner=none", "optimizer.lr=interval(0,1)"]
    code, out, err = run(
        capsys, *SEARCH, *words, "sweeper.n_trials=2", f"runs_dir={tmp_path}", "sweeper.sampler=random"
    )
    assert code == 2  # nothing has come of it
    assert err.count("undefined") == 2
    code, out, err = run(
        capsys, *SEARCH, *words, "sweeper.n_trials=4", f"runs_dir={tmp_path}", "sweeper.sampler=random"
    )
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["FAIL"] * 4
    assert all("undefined" in trial.user_attrs["reason"] for trial in trials)
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 4
    assert out.count("│ failed │") == 4
