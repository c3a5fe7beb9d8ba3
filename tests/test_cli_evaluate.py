"""`diffx evaluate`, `diffx sample` and `diffx reference` as typed, on one tiny trained run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_cli import TINY, run

from diffx.evaluation import Evaluation


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def diffx(*argv, cwd=None):
    return [sys.executable, "-m", "diffx.cli.main", *argv]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two seeds trained with two EMA lengths, evaluated on the way at two points, the best weights kept."""
    root = tmp_path_factory.mktemp("several")
    argv = [
        *[word for word in TINY if not word.startswith(("evaluation.every", "evaluation.num"))],
        "evaluation.every_n_steps=1",
        "evaluation.interim_samples=20",
        "evaluation.num_samples=20",
        'evaluation.interim=["sampler=ddim sampler.steps=3","weights=ema_0.5"]',
        "ema.decay=[0.9,0.5]",
        "ema.warmup=false",
        "checkpoint.monitor=fd_digits",
        f"runs_dir={root}/runs",
    ]
    # the same cache as the tests': statistics computed in other batches differ in the last digits
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache")}
    subprocess.run(diffx("train", "-m", "seed=0,1", *argv), check=True, capture_output=True, text=True, env=environment)
    return sorted(path.parent for path in root.glob("runs/digits/*/seed*/config.yaml"))


def records(path):
    return {file: Evaluation.load(file) for file in sorted((path / "evaluations").glob("*.json"))}


def test_training_evaluates_every_point_and_keeps_the_best_weights(several):
    from safetensors import safe_open

    path = several[0]
    rows = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    measured = {int(row["step"]): float(row["eval/fd_digits"]) for row in table if row.get("eval/fd_digits")}
    assert set(measured) == {1, 2, 3}
    for point in ("sampler=ddim sampler.steps=3", "weights=ema_0.5"):
        values = {int(r["step"]): float(r[f"eval/{point}/fd_digits"]) for r in table if r.get("eval/fd_digits")}
        assert values.keys() == measured.keys() and values != measured
    assert all(float(row["eval/seconds"]) > 0 for row in table if row.get("eval/fd_digits"))
    with safe_open(path / "weights/best.safetensors", framework="pt") as file:
        said = file.metadata()
    assert int(said["step"]) == min(measured, key=measured.__getitem__)
    assert float(said["value"]) == min(measured.values())
    for name in ("progress.png", "progress.gif", "fd_digits-over-steps.png"):
        with Image.open(path / "samples" / name) as image:
            image.load()


def test_each_set_of_weights_can_be_evaluated(capsys, several):
    path = several[0]
    code, out, err = run(capsys, "evaluate", "-m", f"run={path}", "weights=ema,ema_0.5,best", "metrics=[fd]")
    assert code == 0, err
    found = {r.protocol["weights"]: r for r in records(path).values() if list(r.protocol["metrics"]) == ["fd"]}
    assert set(found) == {"ema", "ema_0.5", "best"}
    assert len({r.values["fd_digits"].value for r in found.values()}) == 3
    assert found["best"].protocol["step"] < found["ema"].protocol["step"] == 4
    assert "fd_digits − best" in out
    code, _, err = run(capsys, "evaluate", f"run={path}", "weights=ema_0.4")
    assert code == 2 and "did you mean" in err and "ema_0.5" in err


def test_several_runs_and_patterns_are_measured_in_one_go(capsys, several):
    pattern = str(several[0].parent / "seed*")
    argv = ["evaluate", "-m", f"run={pattern}", "sampler=ddim,euler", "sampler.steps=2,4", "metrics=[fd,pr]"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "[8/8]" in out and "precision_digits" in out.replace("\n", "")
    before = {file: file.stat().st_mtime_ns for path in several for file in path.glob("evaluations/*")}
    assert sum(file.suffix == ".png" for file in before) >= 4  # a plot over NFE for each metric and run
    assert run(capsys, *argv)[0] == 0
    after = {file: file.stat().st_mtime_ns for file in before if file.suffix == ".json"}
    assert after == {file: when for file, when in before.items() if file.suffix == ".json"}
    code, _, err = run(capsys, "evaluate", f"run={several[0].parent}/nothing*")
    assert code == 2 and "matches no run directory" in err


def test_a_record_can_be_repeated_from_itself(capsys, several):
    file = next(iter(records(several[0])))
    before = file.read_bytes()
    command = json.loads(before)["command"].split()
    assert command[:2] == ["diffx", "evaluate"] and command[2] == f"repeat={file}"
    code, out, err = run(capsys, *command[1:])
    assert code == 0, err
    assert "equal" in out and "e-" not in out.split("relative difference")[1].split("protocol")[0]
    assert file.read_bytes() == before
    code, _, err = run(capsys, *command[1:], "sampler=ddim")
    assert code == 2 and "leave 'sampler=ddim' out" in err


def test_a_record_of_other_data_is_not_repeated(capsys, several, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(several[0], copy)
    file = next(iter(records(copy)))
    content = json.loads(file.read_text())
    content["protocol"]["reference"]["fingerprint"] = "0" * 32
    content["fingerprint"] = "0000000000"
    file.write_text(json.dumps(content))
    code, _, err = run(capsys, "evaluate", f"repeat={file}")
    assert code == 2 and "reference changed" in err


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_values(several, tmp_path):
    settings = ["metrics=[fd,is,pr]", "evaluation.num_samples=3000", "sampler=heun", "sampler.steps=6"]
    how = ["evaluation.batch_size=16", "evaluation.save_every=16", "device=cpu"]
    runs = [tmp_path / name for name in ("killed", "whole")]
    for path in runs:
        shutil.copytree(several[1], path, ignore=shutil.ignore_patterns("evaluations"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(diffx("evaluate", f"run={runs[0]}", *settings, *how), env=environment)
        started = time.time()
        while process.poll() is None:
            time.sleep(0.02)
            if any(f.stat().st_mtime > started for f in runs[0].glob("evaluations/step=*.partial.safetensors")):
                break
        process.send_signal(number)
        assert process.wait() == code
        assert list(runs[0].glob("evaluations/step=*.partial.safetensors"))
        assert not list(runs[0].glob("evaluations/*.json"))
    for path in runs:
        subprocess.run(diffx("evaluate", f"run={path}", *settings, *how), env=environment, check=True)
    killed, whole = (next(iter(records(path).values())) for path in runs)
    assert killed.values == whole.values and killed.values["fd_digits"].n == 3000
    assert [f.suffix for f in runs[0].glob("evaluations/*")] == [".json"]


def test_two_processes_write_what_one_writes(several, tmp_path):
    settings = ["metrics=[fd,is,consistency,nearest]", "evaluation.num_samples=50", "evaluation.batch_size=8"]
    values = []
    for devices in (1, 2):
        path = tmp_path / str(devices)
        shutil.copytree(several[0], path, ignore=shutil.ignore_patterns("evaluations"))
        argv = ["evaluate", "-m", f"run={path}", "sampler.steps=2,3", *settings, f"devices={devices}", "device=cpu"]
        subprocess.run(diffx(*argv), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = records(path)
        assert {r.environment["processes"] for r in found.values()} == {devices}
        values.append({file.name: record.values for file, record in found.items()})
    assert values[0].keys() == values[1].keys() and len(values[0]) == 2
    for name, one in values[0].items():
        for key, value in one.items():
            assert values[1][name][key].value == pytest.approx(value.value, rel=1e-3), key


def test_mistakes_in_a_distributed_evaluation_are_told_once(several):
    argv = diffx("evaluate", f"run={several[0]}", "sampler=dimm", "devices=2")
    result = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("diffx:") == 1 and "did you mean" in result.stderr


def test_samples_written_as_files_measure_as_they_did(capsys, several, tmp_path):
    path = several[0]
    code, _, err = run(capsys, "evaluate", f"run={path}", "metrics=[fd,is]", "evaluation.num_samples=30")
    assert code == 0, err
    (record,) = (r for r in records(path).values() if r.protocol["num_samples"] == 30)
    for out in ("folder", "samples.npz", "samples.tar"):
        code, _, err = run(capsys, "sample", f"run={path}", "n=30", f"out={tmp_path / out}")
        assert code == 0, err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for images in ("folder", "samples.npz"):
            code, _, err = run(
                capsys, "evaluate", f"images={images}", "evaluation.reference=test", "metrics=[fd,is]", "device=cpu"
            )
            assert code == 0, err
            written = Evaluation.load(tmp_path / f"{images}.evaluation.json")
            for name in ("fd_digits", "is_digits"):
                assert written.values[name].value == pytest.approx(record.values[name].value, rel=1e-6)
    import webdataset as wds

    shard = list(wds.WebDataset(str(tmp_path / "samples.tar"), shardshuffle=False).decode("pil"))
    assert len(shard) == 30 and [s["cls"] for s in shard] == [k % 10 for k in range(30)]
    first = next(iter(sorted((tmp_path / "folder").glob("*.png"))))
    with Image.open(first) as image:
        assert np.array_equal(np.asarray(image), np.asarray(shard[0]["png"].convert("L")))


def test_a_trajectory_is_drawn(capsys, several, tmp_path):
    code, _, err = run(
        capsys, "sample", f"run={several[0]}", "trajectory=true", "labels=[3]", "n=2", f"out={tmp_path}/t.png"
    )
    assert code == 0, err
    with Image.open(tmp_path / "t.png") as image:
        assert image.size[0] >= 320
    code, _, err = run(capsys, "sample", f"run={several[0]}", "trajectory=true", f"out={tmp_path}/t.npz")
    assert code == 2 and "let out=" in err


def test_a_reference_file_serves_where_the_data_are_not(capsys, several, tmp_path):
    argv = ["reference", "data=digits", "extractor=digits", "evaluation.reference=test", f"out={tmp_path}/r.npz"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "360 images" in out.replace("\n", " ")
    code, _, err = run(
        capsys, "evaluate", f"run={several[0]}", f"evaluation.reference={tmp_path}/r.npz", "metrics=[fd,pr]"
    )
    assert code == 0, err
    (record,) = (r for r in records(several[0]).values() if "file" in r.protocol["reference"])
    assert "pr" in record.omitted and record.values["fd_digits"].value > 0
    (tmp_path / "r.npz").write_bytes(b"PK")
    code, _, err = run(capsys, "evaluate", f"run={several[0]}", f"evaluation.reference={tmp_path}/r.npz")
    assert code == 2 and "damaged" in err


MISTAKES = {
    "evaluation.interim changes the model": (
        ["train", *TINY, 'evaluation.interim=["schedule=edm"]'],
        "changes the model",
    ),
    "unknown weights in training": (["train", *TINY, "weights=ema_0.3"], "there are no weights 'ema_0.3' in training"),
    "best without a metric": (["train", *TINY, "weights=best"], "checkpoint.monitor"),
    "monitor without evaluations": (["train", *TINY, "checkpoint.monitor=fd_digits"], "evaluation.every_n_steps"),
    "ema twice": (["train", *TINY, "ema.decay=[0.9,0.9]"], "list of different ones"),
    "unknown metric": (["train", *TINY, "metrics=[fd,iss]"], "there is no metrics=iss"),
    "reference without extractor": (["reference", "data=digits", "extractor=none"], "no features"),
    "reference to text": (["reference", "data=digits", "out=r.txt"], "must end in .npz"),
    "images absent": (["evaluate", "images=nowhere"], "there are no images at 'nowhere'"),
    "repeat absent": (["evaluate", "repeat=nowhere.json"], "damaged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    argv, expected = MISTAKES[mistake]
    code, _, err = run(capsys, *argv)
    assert code == 2 and expected in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_values_by_different_rulers_are_not_compared(capsys, several):
    argv = ["evaluate", "-m", f"run={several[0]}", "evaluation.reference=train,test", "metrics=[fd]"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert out.count("measured otherwise: not comparable") == 1


@pytest.mark.parametrize("likelihood", ["continuous", "discrete", "flow"])
def test_bits_per_dimension_are_measured_where_asked_for(capsys, several, likelihood):
    small = {"continuous": ["likelihood.draws=2"], "discrete": ["likelihood.draws=2", "likelihood.steps=10"]}
    argv = [f"likelihood={likelihood}", *small.get(likelihood, ["likelihood.rtol=0.01", "likelihood.atol=0.01"])]
    code, _, err = run(capsys, "evaluate", f"run={several[0]}", *argv, "evaluation.likelihood_images=4", "metrics=[fd]")
    assert code == 0, err
    (record,) = (r for r in records(several[0]).values() if likelihood in str(r.settings["likelihood"]).lower())
    value = record.values["bpd"]
    assert value.n == 4 and value.value > 0 and value.stderr > 0
