"""Many runs read as tables: what differs is a column, what is broken is named, and the rest is there."""

import json
import shutil

import pytest
import yaml

from diffx.evaluation import Evaluation
from diffx.experiment import Collection, Run, fingerprint, identity, read_runs
from diffx.metrics import BLOCKS, Value
from diffx.utils import DiffxError

CLASSES = {"cosine": "Cosine", "linear": "Linear", "eps": "Eps", "v": "V", "ddim": "DDIM", "heun": "Heun"}
PROTOCOL = {
    "extractor": "digits",
    "weights_hash": "ab" * 32,
    "preprocessing": "uint8 / 127.5 - 1",
    "quantization": "uint8",
    "reference": {"data": "digits", "split": "test", "images": 360, "fingerprint": "cd" * 16},
    "metrics": {"fd": {"_target_": "diffx.metrics.FrechetDistance"}},
    "sample_seed": 0,
}


def config_of(seed=0, name="ablation", steps=100, **parts):
    """A frozen config; `parts` are choices of groups, or tables."""
    parts = {"schedule": "cosine", "parameterization": "eps", "sampler": "ddim"} | parts
    config = {"name": name, "data": {"_target_": "diffx.data.Digits", "batch_size": 64}, "choices": {"data": "digits"}}
    for group, choice in parts.items():
        if isinstance(choice, str):
            config["choices"][group] = choice
            choice = {"_target_": f"diffx.{group}s.{CLASSES[choice]}"}
        config[group] = choice
    config["sampler"] = {"steps": 10} | config["sampler"]
    return config | {"weights": "ema", "seed": seed, "training": {"max_steps": steps}, "runs_dir": "runs"}


def write_run(root, config, state="finished", step=None, folder=None, log=True):
    """A run directory as training leaves it, without training."""
    digest = fingerprint(identity(config))
    run = Run(root / config["name"] / (folder or f"arm-{digest}") / f"seed{config['seed']}")
    run.path.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    run.set_status(state, step=config["training"]["max_steps"] if step is None else step)
    if log:
        rows = ["step,loss,images,images_per_second", *(f"{s},{1 / s},{64 * s},{s * 10.0}" for s in (10, 20, 100))]
        (run.path / "metrics.csv").write_text("\n".join(rows) + "\n")
    return run


def value(number, spread=0.1, name="fd_digits", n=1000, **other):
    """A value with jackknife blocks."""
    blocks = tuple(number + spread * (k - (BLOCKS - 1) / 2) / BLOCKS for k in range(BLOCKS))
    return Value(name, number, spread, n, "", blocks=blocks, bias=0.0, **other)


def write_evaluation(run, config, *values, step=None, settings=None, choices=None, time="", **protocol):
    """An evaluation of a run as `diffx evaluate` leaves it."""
    asked = {key: config[key] for key in ("sampler", "weights", "schedule")} | (settings or {})
    n = values[0].n if values else 1000
    protocol = {**PROTOCOL, "num_samples": n, "nfe": asked["sampler"]["steps"], "weights": asked["weights"], **protocol}
    protocol |= {"sampler": asked["sampler"]}
    digest = fingerprint(protocol)
    step = config["training"]["max_steps"] if step is None else step
    asked |= {"choices": config["choices"] | (choices or {}), "evaluation": {"num_samples": n, "seed": 0}}
    about = {"step": step, "seed": config["seed"]}
    evaluation = Evaluation(
        {each.name: each for each in values},
        protocol | about,
        digest,
        {"total": 2.0},
        settings=asked,
        environment={"device": "cpu (x86_64)", "time": time},
    )
    file = run.evaluations / f"step={step:08d}-{digest}.json"
    evaluation.save(file)
    return file


def write_arm(root, values, metric="fd_digits", **parts):
    """The runs of an arm, with a value for each seed."""
    for seed, number in enumerate(values):
        config = config_of(seed, **parts)
        write_evaluation(write_run(root, config), config, value(number, name=metric))


# ---- what differs ----


def test_only_what_differs_is_a_column(tmp_path):
    write_arm(tmp_path, [1.0, 2.0], schedule="cosine")
    write_arm(tmp_path, [3.0, 4.0], schedule="linear")
    found = read_runs(tmp_path)
    assert list(found.axes) == ["schedule"] and not found.points and not found.problems
    assert sorted(found.axes["schedule"].values()) == ["cosine", "linear"]
    assert set(found.runs.columns) == {
        *("experiment", "arm", "seed", "state", "step", "schedule", "loss", "images", "images_per_second")
    }
    table = found.evaluations
    assert "parameterization" not in table and "sampler.steps" not in table
    assert table.set_index(["schedule", "seed"])["fd_digits"].to_dict() == {
        ("cosine", 0): 1.0, ("cosine", 1): 2.0, ("linear", 0): 3.0, ("linear", 1): 4.0,
    }  # fmt: skip
    assert (table["nfe"] == 10).all() and (table["num_samples"] == 1000).all()


def test_a_key_below_a_group_counts_between_arms_of_the_same_choice(tmp_path):
    sharp = {"_target_": "diffx.schedules.Cosine", "s": 0.02}
    write_arm(tmp_path, [1.0], schedule={"_target_": "diffx.schedules.Cosine", "s": 0.008})
    write_arm(tmp_path, [1.0], schedule=sharp)
    assert list(read_runs(tmp_path).axes) == ["schedule.s"]
    write_arm(tmp_path, [1.0], schedule={"_target_": "diffx.schedules.Linear", "beta": 1.0})
    # beta and s follow from the choice, but s differs between two arms of one
    assert list(read_runs(tmp_path).axes) == ["schedule", "schedule.s"]


def test_whole_numbers_and_equal_fractions_are_one_value(tmp_path):
    write_arm(tmp_path, [1.0], optimizer={"lr": 1, "beta": 0.9})
    write_arm(tmp_path, [1.0], optimizer={"lr": 1.0, "beta": 0.8})
    assert list(read_runs(tmp_path).axes) == ["optimizer.beta"]


def test_equal_arms_of_two_experiments_are_told_apart(tmp_path):
    for name in ("first", "second"):
        write_arm(tmp_path, [1.0], name=name)
    found = read_runs(tmp_path)
    assert sorted(found.axes["experiment"].values()) == ["first", "second"]


def test_ways_of_sampling_are_points_and_not_axes(tmp_path):
    config = config_of()
    run = write_run(tmp_path, config)
    write_evaluation(run, config, value(1.0))
    write_evaluation(run, config, value(2.0), settings={"sampler": config["sampler"] | {"steps": 5}})
    found = read_runs(tmp_path)
    assert not found.axes and sorted(found.points["sampler.steps"]) == [5, 10]
    heun = {"_target_": "diffx.samplers.Heun", "steps": 5}
    write_evaluation(run, config, value(3.0), settings={"sampler": heun}, choices={"sampler": "heun"})
    found = read_runs(tmp_path)
    assert set(found.points["sampler"]) == {"ddim", "heun"}
    other = {"_target_": "diffx.schedules.Linear"}
    write_evaluation(run, config, value(4.0), settings={"schedule": other}, choices={"schedule": "linear"}, times="x")
    found = read_runs(tmp_path)
    assert not found.axes and set(found.points["sampling schedule"]) == {None, "linear"}


def test_a_budget_of_images_is_no_axis_of_steps(tmp_path):
    for size, steps in ((64, 100), (32, 200)):
        config = config_of() | {"data": {"_target_": "diffx.data.Digits", "batch_size": size}}
        config["training"] = {"max_steps": steps, "max_images": 6400}
        write_run(tmp_path, config)
    assert list(read_runs(tmp_path).axes) == ["data.batch_size"]


def test_history_is_one_table(tmp_path):
    write_arm(tmp_path, [1.0, 2.0], schedule="cosine")
    write_run(tmp_path, config_of(schedule="linear"), log=False)
    table = read_runs(tmp_path).history
    assert len(table) == 6 and set(table["seed"]) == {0, 1} and set(table["schedule"]) == {"cosine"}
    assert Collection([]).history.empty


# ---- what is broken ----


def test_broken_and_unfinished_runs_are_named_and_the_rest_is_there(tmp_path):
    write_arm(tmp_path, [1.0, 2.0])
    whole = read_runs(tmp_path)
    damage = {
        "no-yaml": "schedule: [",
        "empty": "",
        "words": "seed: 3\njust words\n",
        "no-seed": yaml.safe_dump({"name": "x", "data": {}}),
        "no-name": yaml.safe_dump({k: v for k, v in config_of().items() if k != "name"}),
    }
    for name, text in damage.items():
        path = tmp_path / "ablation" / name / "seed0"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(text)
    write_run(tmp_path, config_of(5), state="interrupted", step=40)
    found = read_runs(tmp_path)
    assert len(found) == len(whole) + 1
    assert found.runs["state"].tolist().count("interrupted") == 1
    for name in damage:
        (problem,) = [problem for problem in found.problems if f"/{name}/" in problem]
        assert "left out" in problem and "Traceback" not in problem


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"value": 2.0', '"value": "2,0"'),
        lambda text: text.replace('"values"', '"vals"'),
        lambda text: json.dumps(json.loads(text) | {"protocol": None}),
        lambda text: json.dumps(json.loads(text) | {"settings": [1]}),
        lambda text: json.dumps(json.loads(text) | {"surprise": 1}),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_there(tmp_path, damage):
    write_arm(tmp_path, [1.0, 2.0])
    (file,) = tmp_path.glob("ablation/*/seed1/evaluations/*.json")
    file.write_text(damage(file.read_text()))
    found = read_runs(tmp_path)
    (problem,) = found.problems
    assert str(file) in problem and "left out" in problem
    assert found.evaluations["fd_digits"].tolist() == [1.0] and len(found) == 2


def test_a_damaged_log_costs_its_rows_only(tmp_path):
    write_arm(tmp_path, [1.0, 2.0])
    first, second = sorted(tmp_path.glob("ablation/*/seed*/metrics.csv"))
    first.write_bytes(b"\x00\xff\xfe")
    second.write_text(second.read_text() + "1,2,3,4,5,6,7,8\n")
    found = read_runs(tmp_path)
    assert found.history.query("seed == 1")["step"].tolist() == [10, 20, 100] and len(found.runs) == 2


def test_no_runs_and_no_folder_are_one_sentence(tmp_path):
    with pytest.raises(DiffxError, match="there is no run below"):
        read_runs(tmp_path)
    with pytest.raises(DiffxError, match="there is no folder"):
        read_runs(tmp_path / "absent")


def test_folders_that_overlap_hold_each_run_once(tmp_path, monkeypatch):
    write_arm(tmp_path, [1.0, 2.0])
    monkeypatch.chdir(tmp_path)
    assert len(read_runs(tmp_path, tmp_path / "ablation", "ablation")) == 2
    assert read_runs(tmp_path, "ablation").runs.index.is_unique


def test_a_copied_folder_is_a_second_run_of_the_same_arm_and_seed(tmp_path):
    write_arm(tmp_path, [1.0])
    (source,) = tmp_path.glob("ablation/*")
    shutil.copytree(source, tmp_path / "copy" / source.name)
    first, second = read_runs(tmp_path).members
    assert (first.arm, first.seed) == (second.arm, second.seed)


# ---- selection ----


def test_runs_and_evaluations_are_selected_by_what_is_typed(tmp_path):
    for schedule in ("cosine", "linear"):
        for seed in (0, 1):
            config = config_of(seed, schedule=schedule, optimizer={"lr": 1e-4})
            run = write_run(tmp_path, config)
            for steps in (5, 10):
                write_evaluation(run, config, value(1.0), settings={"sampler": config["sampler"] | {"steps": steps}})
    found = read_runs(tmp_path)
    for wanted, runs, evaluations in (
        ({"schedule": ["linear"]}, 2, 4),
        ({"seed": ["1"]}, 2, 4),
        ({"sampler.steps": ["5"]}, 4, 4),
        ({"sampler.steps": ["5", "10"], "schedule": ["cosine"], "seed": ["0"]}, 1, 2),
        ({"optimizer.lr": ["1e-4"]}, 4, 8),
        ({"experiment": ["ablation"], "sampler": ["ddim"]}, 4, 8),
        ({"evaluation.num_samples": ["1000"]}, 4, 8),
    ):
        chosen = found.where(wanted)
        assert (len(chosen), len(chosen.measurements)) == (runs, evaluations), wanted
    assert list(found.where({"schedule": ["linear"]}).axes) == []
    with pytest.raises(DiffxError, match=r"no key 'shedule'.*did you mean 'schedule'"):
        found.where({"shedule": ["linear"]})
    with pytest.raises(DiffxError, match=r"no run has schedule=sigmoid; there is schedule=cosine,linear"):
        found.where({"schedule": ["sigmoid"]})
