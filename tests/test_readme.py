"""What the README says is what the program does."""

import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_cli import TINY

from diffx.cli import main as cli
from diffx.cli.budget import set_steps
from diffx.cli.compose import compose_config
from diffx.cli.paths import groups

QUICK = ["training.max_steps=2", "autoencoder.base=8"]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
DIFFX = list(dict.fromkeys(command for command in COMMANDS if command.startswith("diffx ")))


def test_the_readme_is_short_and_its_pictures_exist():
    assert len(README.splitlines()) <= 150
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file()


def test_every_make_target_and_file_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)
    for path in re.findall(r"`((?:diffx|configs|notebooks|benchmarks|slurm)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_parts_names_every_choice():
    table = README.split("## Parts")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)`", table))
    for group, choices in groups().items():
        assert group in named, group
        for choice in choices:
            assert choice in named or (choice.startswith("dit_") and "`dit_s_2` … `dit_xl_8`" in table), choice


def test_the_measured_numbers_stand_beside_their_command():
    assert "fd_digits" in README
    assert "DEMO_TABLE" not in README


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *TINY, f"runs_dir={root}"])
    assert stop.value.code == 0
    (config,) = root.glob("digits/*/seed0/config.yaml")
    return config.parent


@pytest.mark.parametrize("command", DIFFX)
def test_every_command_of_the_readme_runs(command, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = [word.replace("RUN", str(run_dir)) if word.startswith("run=") else word for word in shlex.split(command)[1:]]
    if "FOLDER" in argv or "data=folder" in argv or "shards" in command:
        for k in range(20):
            folder = tmp_path / "FOLDER" / f"class{k % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (10 * k, 90, 30)).save(folder / f"{k}.png")
    if "shards" in command and "pack" not in argv:
        assert main_code(["data", "pack", "FOLDER", "shards", "image_size=32"]) == 0
    if "encode" in argv:
        assert main_code(["fit-autoencoder", "data=digits", "out=kl.safetensors", *QUICK]) == 0
    if argv[0] == "fit-autoencoder":
        argv += QUICK
    argv = [word.replace("n_trials=20", "n_trials=2") for word in argv]
    if argv[0] in ("jobs", "wandb"):
        (tmp_path / "runs").symlink_to(run_dir.parents[2])
    if argv[0] in ("compare", "report"):
        arms = ["schedule=cosine,linear", "parameterization=eps,v", "seed=0,1", "evaluation.num_samples=100"]
        tiny = [word for word in TINY if not word.startswith("evaluation.num_samples")]
        assert main_code(["train", "-m", *tiny, *arms, "name=digits_ablation", f"runs_dir={tmp_path}/runs"]) == 0
    if "launcher=slurm" in command:  # stands for a cluster, and says what sbatch says
        (tmp_path / "sbatch").write_text("#!/bin/sh\necho 42\n")
        (tmp_path / "squeue").write_text("#!/bin/sh\n")
        for name in ("sbatch", "squeue"):
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if "--config-dir" in argv:
        (source,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
        (tmp_path / "mypkg.py").write_text(source)
        (tmp_path / "conf/schedule").mkdir(parents=True)
        (tmp_path / "conf/schedule/trig.yaml").write_text("_target_: mypkg.Trigonometric\n")
    if argv[0] == "train" and "--help" not in argv:
        if "experiment=fashion_mnist" in argv:  # its images are not at hand here: it composes
            compose_config("train", argv[1:], [], set_steps)
            return
        if "experiment=digits_ablation" in argv:
            argv += ["training.max_flops=5e8", "schedule=linear", "parameterization=v", "seed=0", "sampler.steps=2,3"]
            argv += ["evaluation.num_samples=100"]
        if any("n_trials" in word for word in argv):
            argv += ["evaluation.num_samples=100", "sweeper.pruner=none"]
        own = {word.partition("=")[0] for word in argv}
        argv += [word for word in TINY if word.partition("=")[0] not in own]
        argv += [word for word in ("evaluation.num_samples=0",) if word.partition("=")[0] not in own]
        argv = list({word.partition("=")[0]: word for word in argv}.values()) if "--config-dir" not in argv else argv
    if argv[0] == "fit-extractor":
        argv += ["epochs=3", "min_accuracy=0.5"]
    if argv[0] == "plan":
        argv += ["probe=0.1"]
    if argv[0] == "learn-times":
        argv += ["n=8", "iterations=1"]
    if argv[0] == "evaluate" and "--help" not in argv:
        argv += ["evaluation.num_samples=20"]
    assert main_code(argv) == 0


def main_code(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code
