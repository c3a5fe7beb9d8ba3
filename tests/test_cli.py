"""The command line as typed: what it says, what it leaves behind, and its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffx.cli import main as cli
from diffx.cli.budget import set_steps
from diffx.cli.compose import compose_config
from diffx.cli.help import COMMANDS, command_help, overview
from diffx.cli.paths import config_dir, groups
from diffx.utils import DiffxError

TINY = [
    "backbone=unet_tiny",
    "training.max_steps=4",
    "data.batch_size=16",
    "evaluation.num_samples=20",
    "evaluation.every_n_steps=0",
    "evaluation.per_class=2",
    "sampler.steps=2",
    "log_every_n_steps=2",
    "progress_bar=false",
    "trainer=cpu",
]


def run(capsys, *argv):
    """Exit code, stdout and stderr of `diffx …`, in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny finished run, its directory and what the command printed."""
    root = tmp_path_factory.mktemp("trained")
    result = subprocess.run(
        [sys.executable, "-m", "diffx.cli.main", "train", *TINY, f"runs_dir={root}/runs"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (config,) = root.glob("runs/digits/*/seed0/config.yaml")
    return config.parent, result.stdout


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ----- help


def test_help_is_answered_without_heavy_imports():
    code = (
        "import sys; from diffx.cli.main import run; run(['--help']); run(['train', '--help']);"
        "heavy = {'torch', 'lightning', 'hydra', 'omegaconf', 'rich', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: diffx COMMAND" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_teaches_with_examples_and_choices(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"diffx {command}" in out
    assert "examples:" in out
    # those that read finished runs compose nothing
    assert ("groups and their choices:" in out) == (command not in ("compare", "report"))


def test_help_names_every_group_and_choice():
    text = command_help("train")
    for group, choices in groups().items():
        assert f"{group}=" in text
        assert all(choice in text for choice in choices)
    assert all(command in overview() for command in COMMANDS)


NO_METRICS = ["extractor=none", "evaluation.num_samples=0"]

# ----- mistakes: one sentence, exit code 2, no traceback, nothing half-written

MISTAKES = {
    "command": (["trian"], "did you mean 'train'"),
    "option": (["train", "--multrun"], "did you mean '--multirun'"),
    "no setting": (["train", "cosine"], "KEY=VALUE"),
    "group": (["train", "shedule=cosine"], "did you mean 'schedule'"),
    "choice": (["train", "schedule=cosin"], "did you mean 'cosine'"),
    "choice names all": (["train", "sampler=foo"], "choose adaptive, ddim"),
    "key": (["train", "schedule=edm", "schedule.sigma_mx=3"], "did you mean 'schedule.sigma_max'"),
    "unknown argument": (["train", "schedule=edm", "+schedule.sigma_mx=3"], "did you mean 'sigma_max'"),
    "number": (["train", "schedule=edm", "schedule.sigma_max=abc"], "schedule.sigma_max must be a number"),
    "whole number": (["train", "seed=1.5"], "seed must be a whole number"),
    "boolean": (["train", "ema.warmup=3"], "ema.warmup must be true or false"),
    "literal": (["train", "evaluation.reference=val"], "train or test"),
    "positive": (["train", "training.max_steps=0"], "at least 1"),
    "syntax": (["train", "schedule.sigma_max=[1,"], "cannot read"),
    "several without -m": (["train", "schedule=linear,cosine"], "-m"),
    "undefined combination": (
        ["train", "schedule=flow", "parameterization=eps"],
        "parameterization=v, x0, flow or edm",
    ),
    "uneven batch": (["train", "data.batch_size=63", "trainer.devices=2"], "62 or 64"),
    "uneven accumulation": (["train", "data.batch_size=63", "trainer.accumulate_grad_batches=2"], "62 or 64"),
    "missing folder": (
        ["train", "data=folder", "data.root=/nowhere", "conditioning=none", "extractor=none"],
        "/nowhere",
    ),
    "missing weights": (["train", "extractor=inception", "extractor.weights=/nowhere.pth"], "/nowhere.pth"),
    "target": (["train", "schedule._target_=diffx.schedules.Linea"], "did you mean 'Linear'"),
    "package": (["train", "schedule._target_=nowhere.Mine"], "cannot be imported"),
    "no length": (["train", "training.max_steps=null"], "training.max_steps"),
    "labels without labels": (["train", "data.num_classes=0"], "conditioning=none"),
    "guidance without labels": (["train", "conditioning=none", "guidance=cfg"], "conditional"),
    "no run": (["sample", "run=/nowhere"], "no run directory"),
    "which run": (["sample"], "run=DIR"),
    "no gpu": (["train", "trainer=gpu"], "GPU"),
    "config folder": (["train", "--config-dir", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(capsys, tmp_path, monkeypatch, mistake):
    argv, expected = MISTAKES[mistake]
    if mistake == "no gpu":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("diffx: ")
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert files_below(tmp_path) == []


def test_a_corrupt_image_is_found_before_training(capsys, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(5):
            Image.new("L", (8, 8), 20 * k).save(tmp_path / "images" / name / f"{k}.png")
    (tmp_path / "images/a/2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    folder = [f"data.root={tmp_path}/images", "data.channels=1", "data.image_size=8", "data.num_classes=2"]
    code, _, err = run(capsys, "train", "data=folder", *folder, "extractor=none", *TINY)
    assert code == 2
    assert "a/2.png" in err
    assert not (tmp_path / "runs").exists()


def test_a_label_out_of_range_is_refused(capsys, trained):
    code, _, err = run(capsys, "sample", f"run={trained[0]}", "labels=[3,10]")
    assert code == 2
    assert "0 to 9" in err


def test_a_hand_edited_config_and_foreign_weights_are_refused(capsys, trained, tmp_path):
    import shutil

    copy = tmp_path / "seed0"
    shutil.copytree(trained[0], copy)
    (copy / "weights/ema.safetensors").write_bytes(b"not weights")
    code, _, err = run(capsys, "sample", f"run={copy}")
    assert code == 2
    assert "cannot be loaded" in err
    (copy / "config.yaml").write_text("a: [")
    code, _, err = run(capsys, "sample", f"run={copy}")
    assert code == 2
    assert "no valid YAML" in err


# ----- the commands


def test_train_leaves_a_self_describing_run(trained):
    path, out = trained
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["training"]["max_steps"] == 4
    assert "${" not in (path / "config.yaml").read_text()
    assert json.loads((path / "status.json").read_text()) == {"state": "finished", "step": 4}
    launch = json.loads((path / "launches.jsonl").read_text().splitlines()[0])
    assert {"command", "commit", "packages", "host"} <= set(launch)
    (evaluation,) = (path / "evaluations").glob("*.json")
    content = json.loads(evaluation.read_text())
    assert {"fd_digits", "is_digits", "class_consistency", "fd_digits_floor", "fd_digits_noise"} <= set(
        content["values"]
    )
    assert content["values"]["fd_digits"]["stderr"] > 0
    protocol = content["protocol"]
    assert protocol["nfe"] == 2
    assert len(protocol["weights_hash"]) == 64
    assert protocol["reference"]["images"] == 360
    for word in ("fd_digits", "± 1 s.e.", "what to type next", str(path)):
        assert word in out.replace("\n", "")
    assert (path / "samples/final.png").stat().st_size > 0
    assert not [f for f in files_below(path) if ".tmp" in f]


def test_the_same_command_recognises_the_finished_run_and_other_questions_do_not_train(capsys, trained):
    path, _ = trained
    weights = (path / "weights/ema.safetensors").stat().st_mtime_ns
    code, out, _ = run(capsys, "train", *TINY, f"runs_dir={path.parents[2]}")
    assert code == 0
    assert "is finished" in out
    code, _, _ = run(capsys, "train", *TINY, f"runs_dir={path.parents[2]}", "sampler=ddim")
    assert code == 0
    assert len(list((path / "evaluations").glob("*.json"))) == 2
    assert (path / "weights/ema.safetensors").stat().st_mtime_ns == weights


def test_sample_takes_other_samplers_and_writes_every_form(capsys, trained, tmp_path):
    import numpy as np

    path, _ = trained
    code, out, err = run(capsys, "sample", f"run={path}", "sampler=dpmpp_2m", "sampler.steps=3", "n=9")
    assert code == 0, err
    assert "NFE 3" in out
    assert len(list((path / "samples").glob("samples-*.png"))) == 1
    cfg = ["guidance=cfg", "guidance.scale=2", "labels=[3,7]"]
    code, _, err = run(capsys, "sample", f"run={path}", "n=6", *cfg, f"out={tmp_path}/s.npz")
    assert code == 0, err
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (6, 8, 8, 1)
        assert file["arr_0"].dtype == np.uint8
        assert file["label"].tolist() == [3, 7, 3, 7, 3, 7]
    code, out, err = run(capsys, "sample", f"run={path}", "n=3", f"out={tmp_path}/folder", "seed=4", "schedule=edm")
    assert code == 0, err
    assert "trained on schedule Cosine, sampled on EDM at equal logSNR" in out
    assert files_below(tmp_path / "folder") == ["0-class0.png", "1-class1.png", "2-class2.png"]
    code, _, err = run(capsys, "sample", f"run={path}", "n=3", f"out={tmp_path}/folder")
    assert code == 2
    assert "not an empty folder" in err


def test_evaluate_sweeps_and_computes_only_what_is_missing(capsys, trained):
    path, _ = trained
    argv = ["evaluate", "-m", f"run={path}", "sampler=euler,ddim", "sampler.steps=2,3", "evaluation.num_samples=20"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "[4/4]" in out
    before = {f: f.stat().st_mtime_ns for f in (path / "evaluations").glob("*.json")}
    assert run(capsys, *argv)[0] == 0
    assert {f: f.stat().st_mtime_ns for f in (path / "evaluations").glob("*.json")} == before


def test_multirun_checks_every_arm_first_and_trains_each_once(capsys, tmp_path):
    common = [*TINY, "evaluation.num_samples=0", f"runs_dir={tmp_path}/runs"]
    code, _, err = run(capsys, "train", "-m", "schedule=edm,flow", "parameterization=edm,wrong", *common)
    assert code == 2
    assert "parameterization=wrong" in err
    assert not (tmp_path / "runs").exists()
    code, out, err = run(capsys, "train", "-m", "schedule=edm,cosine", "seed=0,1", *common)
    assert code == 0, err
    assert "[4/4]" in out
    runs = sorted(p.parent for p in tmp_path.glob("runs/digits/*/*/status.json"))
    assert [r.name for r in runs] == ["seed0", "seed1"] * 2
    assert len({r.parent for r in runs}) == 2
    # a failing arm does not take the others with it
    code, out, err = run(capsys, "train", "-m", "schedule=flow", "parameterization=eps,flow", *common)
    assert code == 2
    assert "undefined" in err
    assert len(list(tmp_path.glob("runs/digits/*/*/status.json"))) == 5


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    argv = [sys.executable, "-m", "diffx.cli.main", "train", *TINY, "training.max_steps=100000", f"runs_dir={tmp_path}"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("digits/*/seed0/metrics.csv")):
        assert process.poll() is None
    process.send_signal(2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in out
    (run_dir,) = tmp_path.glob("digits/*/seed0")
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert [f.name for f in (run_dir / "checkpoints").iterdir()] == [f"step={status['step']:08d}.ckpt"]


def test_fit_extractor_refuses_a_weak_classifier_and_saves_a_good_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "fit-extractor", "data=digits", "epochs=1", "min_accuracy=0.999", "out=d.safetensors")
    assert code == 2
    assert "accuracy" in err
    assert files_below(tmp_path) == []
    code, out, err = run(capsys, "fit-extractor", "data=digits", "epochs=3", "min_accuracy=0.5", "out=d.safetensors")
    assert code == 0, err
    assert "held-out accuracy" in out
    assert (tmp_path / "d.safetensors").is_file()


# ----- configs


def test_a_schedule_from_the_users_own_package(capsys, tmp_path, monkeypatch):
    (tmp_path / "mypkg.py").write_text(
        "import torch\n"
        "from diffx.schedules import Schedule\n\n"
        "class Trigonometric(Schedule):\n"
        "    def __init__(self, power: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.power = power\n\n"
        "    def forward(self, t):\n"
        "        angle = torch.pi / 2 * t**self.power\n"
        "        return torch.cos(angle), torch.sin(angle)\n"
    )
    (tmp_path / "conf/schedule").mkdir(parents=True)
    (tmp_path / "conf/schedule/trig.yaml").write_text("_target_: mypkg.Trigonometric\npower: 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ["--config-dir", "conf", "schedule=trig", "parameterization=v"]
    code, _, err = run(capsys, "train", *mine, *TINY, "evaluation.num_samples=0")
    assert code == 0, err
    code, _, err = run(capsys, "train", *mine, "schedule.power=x", *TINY)
    assert code == 2
    assert "schedule.power must be a number" in err


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes_and_its_parts_exist(experiment):
    config = compose_config("train", [f"experiment={experiment}"], [], set_steps)
    assert config["training"]["max_steps"] > 0


def test_a_budget_of_images_becomes_one_of_steps():
    config = compose_config("train", ["training.max_images=6400", "lr_schedule=cosine"], [], set_steps)
    assert config["training"]["max_steps"] == 100
    assert config["lr_schedule"]["total_steps"] == 100


def test_every_yaml_of_a_group_composes():
    for group, choices in groups().items():
        if group in ("experiment",):
            continue
        for choice in choices:
            overrides = [f"{group}={choice}"]
            if "???" in (config_dir() / group / f"{choice}.yaml").read_text():
                with pytest.raises(DiffxError, match="set "):
                    compose_config("train", overrides, [], set_steps)
                continue
            compose_config("train", overrides, [], set_steps)


def test_the_console_script_answers():
    script = Path(sys.executable).with_name("diffx")
    if not script.is_file():
        pytest.fail("the package is not installed: run make install")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.startswith("diffx ")
