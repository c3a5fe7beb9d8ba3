"""Arms at equal budgets, sweeps in two stages, and arms that share their random numbers."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from diffx.cli.build import build
from diffx.cli.compose import Arguments, parse
from diffx.cli.grid import two_stages
from diffx.cli.main import main
from diffx.cli.train import config_of
from diffx.training import DiffusionModule
from diffx.training.callbacks import EvaluateEMA
from diffx.training.energy import EnergyMeter
from diffx.training.flops import training_flops
from diffx.utils import DiffxError

TINY = [
    "trainer=cpu",
    "backbone=unet_tiny",
    "data.batch_size=16",
    "evaluation.every_n_steps=0",
    "evaluation.num_samples=40",
    "evaluation.per_class=1",
    "metrics=[fd]",
    "sampler.steps=2",
    "log_every_n_steps=2",
    "progress_bar=false",
]


def train(tmp_path, *words):
    with pytest.raises(SystemExit) as ended:
        main(["train", *TINY, f"runs_dir={tmp_path}/runs", *words])
    return ended.value.code, sorted(file.parent for file in tmp_path.glob("runs/*/*/seed*/config.yaml"))


def log(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def settings(*words):
    return config_of([*TINY, *words], Arguments())


# ---- budgets ----


def test_arms_of_different_networks_train_for_equal_operations(tmp_path):
    budget = 1e9
    for backbone in ("unet_tiny", "dit_tiny"):
        words = ["training.max_steps=7", f"training.max_flops={budget}", f"backbone={backbone}"]
        _, runs = train(tmp_path, *words, "evaluation.num_samples=0")
    spent, steps = [], []
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        arm = build(config)
        step = training_flops(arm.module, next(iter(arm.source.train_loader(0)))) * config["data"]["batch_size"]
        steps.append(config["training"]["max_steps"])
        # the log tells of whole windows
        spent.append(float(log(run)[-1]["flops"]))
        assert budget - step < steps[-1] * step <= budget
        assert spent[-1] == pytest.approx(steps[-1] // 2 * 2 * step)
    assert len(set(steps)) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training.max_flops=1000"], "less than one step"),
        (["training.max_flops=1e9", "training.max_images=100"], "leave one out"),
        (["training.max_flops=-1"], "at least 1"),
        (["training.max_device_seconds=soon"], "training.max_device_seconds must be"),
    ],
)
def test_an_impossible_budget_is_refused(words, said):
    with pytest.raises(DiffxError, match=said):
        settings(*words)


def test_a_budget_of_seconds_ends_training_and_is_not_spent_twice(tmp_path):
    words = ["training.max_steps=1000", "training.max_device_seconds=1", "checkpoint.every_n_steps=1000"]
    code, (run,) = train(tmp_path, *words)
    rows, state = log(run), json.loads((run / "status.json").read_text())
    assert code == 0 and state["state"] == "finished" and 0 < state["step"] == int(rows[-1]["step"]) < 1000
    assert all(float(row["device_seconds"]) < 1 for row in rows[:-1]) and float(rows[-1]["device_seconds"]) >= 1
    assert len(list(run.glob("evaluations/*.json"))) == 1
    # as if it had been killed in the evaluation
    (run / "status.json").write_text(json.dumps({"state": "evaluating", "step": state["step"]}))
    for file in run.glob("evaluations/*.json"):
        file.unlink()
    code, _ = train(tmp_path, *words)
    assert code == 0 and len(log(run)) == len(rows) and len(list(run.glob("evaluations/*.json"))) == 1


def test_the_log_adds_up_what_training_costs_without_evaluations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds, function):
        def slow(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(DiffusionModule, "optimizer_step", takes(1, DiffusionModule.optimizer_step))
    monkeypatch.setattr(EvaluateEMA, "evaluate", takes(1000, EvaluateEMA.evaluate))
    _, (run,) = train(tmp_path, "training.max_steps=6", "evaluation.every_n_steps=2", "evaluation.num_samples=0")
    rows = log(run)
    assert [float(row["device_seconds"]) for row in rows] == [2, 4, 6]
    each = [float(row["flops"]) / float(row["images"]) for row in rows]
    assert min(each) == max(each) > 0


def test_energy_is_what_the_driver_counts(monkeypatch):
    counter = iter([5_000.0, 7_500.0, 11_000.0])
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": next(counter)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = EnergyMeter(torch.device("cuda"))
    assert meter.tells and meter.joules() == 2.5 and meter.joules() == 3.5
    assert not EnergyMeter(torch.device("cpu")).tells and EnergyMeter(torch.device("cpu")).joules() == 0


# ---- two stages ----


def test_axes_of_sampling_train_no_further_models():
    words = ["schedule=linear,cosine,edm", "sampler=ddim,heun", "seed=0,1", "sampler.steps=5,10", "weights=ema"]
    split = two_stages(parse(["-m", *words]))
    assert split.overrides == [
        "schedule=linear,cosine,edm",
        "seed=0,1",
        "weights=ema",
        "sampler=ddim",
        "sampler.steps=5",
        "evaluation.final=['sampler=ddim sampler.steps=5','sampler=ddim sampler.steps=10',"
        "'sampler=heun sampler.steps=5','sampler=heun sampler.steps=10']",
    ]
    assert two_stages(parse(["-m", "schedule=linear,cosine"])).overrides == ["schedule=linear,cosine"]


def test_axes_of_an_experiments_file_can_be_named_anew():
    file = two_stages(parse(["-m", "experiment=digits_ablation"])).overrides
    assert {"seed=0,1,2", "schedule=linear,cosine,flow_clipped", "parameterization=eps,x0,v"} < set(file)
    typed = two_stages(parse(["-m", "experiment=digits_ablation", "schedule=edm", "sampler=euler"])).overrides
    assert "schedule=edm" in typed and not any(word.startswith("schedule=linear") for word in typed)
    assert "evaluation.final=['sampler.steps=20','sampler.steps=10','sampler.steps=5']" in typed


def test_every_model_is_trained_once_and_measured_at_every_point(tmp_path):
    words = ["-m", "schedule=linear,cosine", "training.max_steps=2", "sampler.steps=2,3"]
    code, runs = train(tmp_path, *words, "sampler=ddim,euler")
    assert code == 0 and len(runs) == 2

    def measured(run):
        found = {}
        for file in run.glob("evaluations/*.json"):
            asked = json.loads(file.read_text())["settings"]
            found[asked["choices"]["sampler"], asked["sampler"]["steps"]] = file.stat().st_mtime_ns
        return found

    before = [measured(run) for run in runs]
    assert all(set(found) == {(s, n) for s in ("ddim", "euler") for n in (2, 3)} for found in before)
    trained = [(run / "weights/ema.safetensors").stat().st_mtime_ns for run in runs]
    code, again = train(tmp_path, *words, "sampler=ddim,euler,heun")  # only what is missing
    assert code == 0 and again == runs
    assert [(run / "weights/ema.safetensors").stat().st_mtime_ns for run in runs] == trained
    for run, known in zip(runs, before, strict=True):
        found = measured(run)
        assert len(found) == 6 and known.items() <= found.items()


def test_a_point_that_would_change_the_model_is_refused():
    with pytest.raises(DiffxError, match=r"evaluation\.final holds 'schedule=edm'"):
        settings("evaluation.final=['schedule=edm']")


# ---- common random numbers ----


class Spy(torch.nn.Module):
    """Keeps what a network is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x, logsnr, **cond):
        self.seen.append((x.detach(), logsnr.detach(), {k: v for k, v in cond.items() if v is not None}))
        return self.network(x, logsnr, **cond)


def first_steps(*words):
    """Initial weights, and what the network of an arm is given in its first steps."""
    arm = build(settings("training.max_steps=4", *words))
    weights = {name: value.clone() for name, value in arm.module.denoiser.backbone.state_dict().items()}
    spy = Spy(arm.module.denoiser.backbone)
    arm.module.denoiser.backbone = spy
    loader = iter(arm.source.train_loader(arm.config["seed"]))
    batches = [next(loader) for _ in range(3)]
    for batch in batches:
        arm.module.training_step(batch, 0)
    return weights, batches, spy.seen, arm.module.denoiser.schedule


@pytest.mark.parametrize(
    "words",
    [["parameterization=eps"], ["weighting=min_snr"], ["optimizer.lr=1e-4"], ["schedule=linear"], ["backbone.base=12"]],
    ids=lambda words: words[0],
)
def test_arms_of_one_seed_share_data_times_noise_and_weights(words):
    weights, batches, seen, schedule = first_steps()
    others, other_batches, other_seen, other_schedule = first_steps(*words)
    for batch, other in zip(batches, other_batches, strict=True):
        assert all(batch[name].equal(other[name]) for name in batch)
    if words != ["backbone.base=12"]:
        assert weights.keys() == others.keys() and all(value.equal(others[name]) for name, value in weights.items())
    for (x, logsnr, cond), (y, other_logsnr, other_cond) in zip(seen, other_seen, strict=True):
        times, other_times = schedule.inverse(logsnr), other_schedule.inverse(other_logsnr)
        torch.testing.assert_close(times, other_times, rtol=1e-4, atol=1e-5)
        assert all(cond[name].equal(other_cond[name]) for name in cond)
        if words != ["schedule=linear"]:
            assert x.equal(y)
    different = first_steps("seed=1")
    assert not different[1][0]["index"].equal(batches[0]["index"]) or not different[1][0]["x"].equal(batches[0]["x"])
    assert not different[2][0][0].equal(seen[0][0])
