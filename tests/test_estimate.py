"""What `diffx plan` says a sweep costs: the arithmetic, and a trial that leaves nothing behind."""

import pytest
import torch
from test_cli import TINY, files_below, run

from diffx.cli.compose import Arguments
from diffx.cli.estimate import estimate
from diffx.cli.train import config_of
from diffx.denoisers import Preconditioned
from diffx.experiment import locate
from diffx.experiment.cost import Cost, Speed, Work, cost, remaining
from diffx.training.probe import TrainingSpeed

torch.set_num_threads(1)

ARM = [*TINY, "evaluation.num_samples=0"]


def arm(*words):
    """A run and its config, from what would be typed."""
    argv = list({word.partition("=")[0]: word for word in (*ARM, *words)}.values())
    config = config_of(argv, Arguments(argv))
    return locate(config["runs_dir"], config, argv), config


# ----- the arithmetic

CONFIG = {
    "training": {"max_steps": 1000},
    "checkpoint": {"every_n_steps": 300},
    "evaluation": {
        "every_n_steps": 250,
        "interim_samples": 40,
        "num_samples": 500,
        "interim_points": {"sampler=ddim": {}},
    },
}


def test_what_is_left_of_a_run():
    # evaluations at 250, 500, 750, the final one at 1000; checkpoints at 300, 600, 900 and at the end
    whole = remaining(CONFIG, 0, grid=10, compared=7)
    assert whole == Work(1000, 4, {"": 3 * (10 + 40) + 10 + 500, "sampler=ddim": 3 * 40}, 3 * 2 * 40 + 500 + 7)
    assert remaining(CONFIG, 500, 10, 7) == Work(500, 3, {"": 50 + 510, "sampler=ddim": 40}, 80 + 507)
    assert remaining(CONFIG, 1000, 10, 7) == Work(0, 0, {"": 510, "sampler=ddim": 0}, 507)


def test_grids_only():
    config = CONFIG | {"evaluation": {"every_n_steps": 0, "interim_samples": 0, "num_samples": 0, "interim_points": {}}}
    assert remaining(config, 0, grid=10, compared=7) == Work(1000, 4, {"": 10}, 0)


def test_seconds_are_counts_times_speeds():
    speed = Speed(TrainingSpeed(0.5, 3.0, 2.0, 10), {"": 0.01, "other": 0.1}, 0.001, 10, 1e9)
    work = Work(100, 4, {"": 300, "other": 20}, 1000)
    assert cost(work, speed, 1) == Cost(pytest.approx(3 + 50 + 8), pytest.approx(3 + 2 + 1), 1)
    shared = cost(work, speed, 4)
    assert shared.training == pytest.approx(61) and shared.evaluation == pytest.approx(6 / 4)
    assert shared.device_hours == pytest.approx(4 * (61 + 1.5) / 3600)
    assert cost(Work(0, 0, {"": 300, "other": 0}, 0), speed, 1) == Cost(0, pytest.approx(3), 1)


# ----- the trial


def test_a_trial_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(7)
    expected = torch.rand(5)
    torch.manual_seed(7)
    (found,) = estimate([arm(f"runs_dir={tmp_path}/runs")], seconds=0.1)
    assert torch.rand(5).equal(expected)
    assert files_below(tmp_path) == []
    assert not found.problem
    assert found.cost.training > 0 and found.cost.evaluation > 0 and found.images_per_second > 0
    assert found.speed.memory > 2**20 and found.speed.flops > 1e6


def test_training_is_the_same_after_a_trial(tmp_path):
    def weights(folder, tried):
        words = [*ARM, f"runs_dir={folder}"]
        if tried:
            estimate([arm(f"runs_dir={folder}")], seconds=0.1)
        with pytest.raises(SystemExit):
            from diffx.cli import main

            main.main(["train", *dict.fromkeys(words)])
        (file,) = folder.glob("digits/*/seed0/weights/ema.safetensors")
        return file.read_bytes()

    assert weights(tmp_path / "a", False) == weights(tmp_path / "b", True)


def test_equal_networks_are_tried_out_once(monkeypatch):
    from diffx.cli import estimate as module

    tried = []
    probe = module.probe_training
    monkeypatch.setattr(module, "probe_training", lambda *args, **kwargs: tried.append(1) or probe(*args, **kwargs))
    words = [["schedule=linear", "optimizer.lr=0.1"], ["parameterization=eps", "training.max_steps=9"], ["seed=3"]]
    same = estimate([arm(*some) for some in words], seconds=0.05)
    assert len(tried) == 1 and len({found.speed.training.step for found in same}) == 1
    others = [
        ["data.batch_size=8"],
        ["backbone.base=16"],
        ["objective=elbo", "schedule=learned"],
        ["ema.decay=[0.9,0.99]"],
    ]
    estimate([arm(*some) for some in others], seconds=0.05)
    assert len(tried) == 1 + len(others)


def test_finished_runs_cost_nothing(tmp_path, capsys):
    words = [*ARM, f"runs_dir={tmp_path}"]
    assert run(capsys, "train", *words)[0] == 0
    done, open_ = estimate([arm(f"runs_dir={tmp_path}"), arm(f"runs_dir={tmp_path}", "seed=1")], seconds=0.05)
    assert done.finished and done.cost is None
    assert not open_.finished and open_.cost.seconds > 0
    code, out, _ = run(capsys, "plan", *words, "seed=0,1", "probe=0.05", f"out={tmp_path}/plan.png")
    assert code == 0 and "1 of 2 runs are to do" in out and "CPU-hours" in out


def test_each_of_several_processes_is_tried_with_its_share():
    (found,) = estimate([arm("trainer.devices=2", "trainer.num_nodes=2", "likelihood=continuous")], seconds=0.05)
    assert found.cost.processes == 4
    assert found.images_per_second == pytest.approx(16 / found.speed.training.step)
    assert any("communication" in words for words in found.left_out)
    assert "bits per dimension" in found.left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_tried_is_told_and_not_raised(tmp_path):
    arms = [
        arm("trainer=gpu"),
        arm("data.batch_size=15", "trainer.devices=2"),
        arm("data=folder", f"data.root={tmp_path}", "data.num_classes=2", "extractor=none"),
    ]
    no_gpu, uneven, absent = estimate(arms, seconds=0.05)
    assert "no GPU" in no_gpu.problem and "14 or 16" in uneven.problem and str(tmp_path) in absent.problem
    assert all(found.cost is None for found in (no_gpu, uneven, absent))


def test_flops_are_those_of_the_paper():
    # Peebles and Xie (arXiv 2212.09748), Tab. 1: DiT-S/2 takes 6.06 G multiply-adds for 32×32 latents; three times that
    # forward and backward
    from conftest import build

    from diffx.training.flops import training_flops

    class Module(torch.nn.Module):
        device, objective, first_nonfinite = torch.device("cpu"), None, None

        def __init__(self):
            super().__init__()
            network = build("backbone", "dit_s_2", in_channels=4, image_size=32, num_classes=1000, out_channels=8)
            self.denoiser = Preconditioned(network, build("schedule", "linear"), build("parameterization", "v"))

        def training_step(self, batch, _):
            at = self.denoiser.coefficients(torch.full((2,), 0.5))
            return {"loss": self.denoiser.network(batch["x"], at, label=batch["index"]).sum()}

    flops = training_flops(Module(), {"x": torch.zeros(8, 4, 32, 32), "index": torch.arange(8)})
    assert flops == pytest.approx(3 * 2 * 6.06e9, rel=0.03)


@pytest.mark.parametrize("word", ["soon", "-1", "nan"])
def test_a_wrong_time_is_refused(word, capsys, tmp_path):
    code, _, err = run(capsys, "plan", f"probe={word}", f"out={tmp_path}/plan.png")
    assert code == 2 and "probe=false" in err
    assert files_below(tmp_path) == []
