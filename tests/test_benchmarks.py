"""Every part of the benchmarks runs, in its smallest form, and writes what it has measured. No time is asserted."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
PEERS = {
    "training": {"diffusers + accelerate": ("accelerate",), "lucidrains' Trainer": ("denoising_diffusion_pytorch",)},
    "networks": {
        "azula UNet": ("azula",),
        "azula DiT": ("azula",),
        "lucidrains Unet": ("denoising_diffusion_pytorch",),
    },
}
PARTS = ("training", "networks", "switches", "sampler", "start-up", "checkpoint", "noise", "evaluation", "loading")


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the benchmarks on the path, as when one of its scripts runs, and all settings restored."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    own = {file.stem for file in FOLDER.glob("*.py")}
    yield
    torch.set_num_threads(threads)
    for name in own:  # `run` and `measure` are names that others may use
        sys.modules.pop(name, None)


def test_all_parts_are_known(benchmarks):
    run = importlib.import_module("run")
    assert set(run.PARTS) == set(PARTS)
    assert all((FOLDER / f"{module}.py").is_file() for module in run.PARTS.values())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs(benchmarks, part, tmp_path):
    run = importlib.import_module("run")
    output = tmp_path / "results.json"
    run.main(["--quick", "--only", part, "--output", str(output)])
    report = json.loads(output.read_text())
    if part in report["skipped"]:
        pytest.skip(report["skipped"][part])
    assert report["torch"] and report["cores"] >= 1 and report["quick"]
    assert len(report["rows"]) >= 2
    assert all(math.isfinite(row["median"]) for row in report["rows"])
    contenders = {row["contender"] for row in report["rows"]}
    for peer, packages in PEERS.get(part, {}).items():
        installed = all(importlib.util.find_spec(package) for package in packages)
        assert (peer in contenders) == installed


@pytest.mark.parametrize("attention", [False, True])
def test_u_nets_are_of_equal_configuration(benchmarks, attention):
    """diffx's and diffusers' have the same number of parameters and operations, at full size."""
    networks = importlib.import_module("networks")
    contenders = networks.unets(False, attention)

    def size(name):
        network = contenders[name].network
        flops = networks.count(lambda: networks.work(contenders[name], networks.images(3), False))
        return sum(parameter.numel() for parameter in network.parameters()), flops

    assert size("diffx") == pytest.approx(size("diffusers UNet2DModel"), rel=0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and would be measured for an hour")
def test_gpu_says_that_it_needs_one(benchmarks, capsys, tmp_path):
    gpu = importlib.import_module("gpu")
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
    said = capsys.readouterr().err.strip()
    assert "needs a GPU" in said and "\n" not in said
    assert not (tmp_path / "gpu.json").exists()


def test_gpu_lines_run_on_a_cpu(benchmarks, tmp_path):
    gpu = importlib.import_module("gpu")
    output = tmp_path / "gpu.json"
    models = ["dit_xl_2", "ddpm_cifar10"]
    assert gpu.main(["--device", "cpu", "--quick", "--models", *models, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert {row["model"] for row in report["training"]} == set(models)
    assert all(row["images_per_second"] > 0 and row["utilisation"] > 0 for row in report["training"])
    assert {row["compile"] for row in report["sampling"]} == {False, True, "reduce-overhead"}
    assert all(row["images_per_second"] > 0 for row in report["sampling"])
    assert math.isfinite(report["checkpoint"][0]["longest_pause_ms"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_rows_on_a_gpu(benchmarks, tmp_path):
    """Small networks on the GPU, uncompiled: no step waits for the device."""
    gpu = importlib.import_module("gpu")
    output = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert all(row["peak_gib"] > 0 for row in report["training"])
    assert all(row["synchronisations_per_step"] == 0 for row in report["training"])
