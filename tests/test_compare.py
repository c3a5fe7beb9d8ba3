"""A comparison says what the numbers say, with intervals that stand on what they say, and names what is wrong."""

import csv
import io
import math
import re
import shutil

import numpy as np
import pytest
from scipy import stats
from test_cli import run as diffx
from test_collection import config_of, value, write_arm, write_evaluation, write_run

from diffx.compare import between_samples, between_seeds, compare, direction, holm, mean_over_seeds, metric_of, render
from diffx.compare.budget import Budget
from diffx.compare.tables import rounded
from diffx.experiment import read_runs
from diffx.metrics import Value, paired
from diffx.utils import DiffxError

COSINE, LINEAR = [5.0, 5.4, 5.9], [5.6, 5.9, 6.6]


@pytest.fixture
def two(tmp_path):
    """Two arms of three seeds each."""
    write_arm(tmp_path, COSINE, schedule="cosine")
    write_arm(tmp_path, LINEAR, schedule="linear")
    return tmp_path


def compared(root, *arguments, **settings):
    return compare(read_runs(root), *arguments, **settings)


def said(comparison, *words):
    """The one note that has all these words."""
    (note,) = [note for note in comparison.notes if all(word in note for word in words)]
    return note


def row_of(comparison, **cells):
    (row,) = [row for row in comparison.rows if all(row.cells[key] == value for key, value in cells.items())]
    return row


# ---- statistics ----


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_mean_over_seeds_has_students_interval(n):
    numbers = np.random.default_rng(n).normal(3.0, 1.0, n).tolist()
    found = mean_over_seeds([value(number) for number in numbers])
    low, high = stats.t.interval(0.95, n - 1, np.mean(numbers), stats.sem(numbers))
    assert found.interval == pytest.approx((low, high)) and found.value == pytest.approx(np.mean(numbers))
    assert found.over == "seeds" and found.half == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_differences_over_seeds_are_the_paired_t_test(n):
    draw = np.random.default_rng(n)
    shared = draw.normal(0, 5, n)
    a, b = (shared + draw.normal(mean, 0.1, n) for mean in (0.1, 0.0))
    found, reference = between_seeds(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(reference.pvalue)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    # what both seeds share has cancelled: unpaired, nothing could be told
    assert found.half < 0.5 * stats.ttest_ind(a, b).confidence_interval(0.95).high


def test_equal_values_are_no_difference_and_no_division_by_zero():
    assert between_seeds([1.0, 2.0], [1.0, 2.0]).p == 1.0
    # two equal differences are no proof that a third one would be equal, too
    same = between_seeds([2.1, 3.1], [1.0, 2.0])
    assert (same.value, same.interval, same.p) == (pytest.approx(1.1), None, None)


def test_one_seed_has_the_interval_over_its_samples():
    one = value(5.0, spread=0.2)
    found = mean_over_seeds([one])
    assert found.over == "samples" and found.half == pytest.approx(stats.t.ppf(0.975, 9) * 0.2)
    assert mean_over_seeds([Value("fd", 5.0, None, 10, "")]).interval is None
    mean = Value("bpd", 5.0, 0.2, 101, "")  # not by the jackknife: over its images
    assert mean_over_seeds([mean]).half == pytest.approx(stats.t.ppf(0.975, 100) * 0.2)


def test_differences_over_samples_are_the_paired_jackknife():
    a, b = value(5.0, spread=0.4), value(4.9, spread=0.1)
    found, effect = between_samples(a, b), paired(a, b)
    assert found is not None and found.over == "samples" and found.interval == effect.interval
    assert found.p == pytest.approx(2 * stats.t.sf(abs(effect.difference) / effect.stderr, 9))
    assert (found.p < 0.05) == effect.distinguishable
    assert between_samples(a, Value("fd_digits", 1.0, None, 1000, "")) is None


def test_holm():
    # Wright, Adjusted P-Values for Simultaneous Inference, Biometrics 48, 1992, and by hand
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.04]) == [0.04] and holm([]) == []
    raw = np.random.default_rng(0).uniform(size=20).tolist()
    assert all(a >= p for a, p in zip(holm(raw), raw, strict=True))
    assert np.argsort(holm(raw)).tolist()[:3] == np.argsort(raw).tolist()[:3]


def test_holm_keeps_false_verdicts_rare():
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        baseline = draw.normal(size=4)
        p = [between_seeds(draw.normal(size=4).tolist(), baseline.tolist()).p for _ in range(6)]
        wrong += min(holm([each for each in p if each is not None])) <= 0.05
    assert wrong / 400 < 0.08  # without the correction about a quarter


# ---- metrics ----


def test_which_way_is_better_stands_in_one_place():
    lower = ["fid", "fd_digits", "fid_infinity", "fd_infinity_digits", "per_class_fd_digits", "fd_digits_class_3"]
    lower += ["kid", "kd_digits", "cmmd", "bpd"]
    higher = ["is", "is_digits", "precision", "recall_digits", "density_digits", "coverage", "class_consistency"]
    neither = ["nn_ratio", "nn_distance", "nfe", "fd_digits_floor", "fd_digits_noise", "isolated", "novelty"]
    for names, sign in ((lower, -1), (higher, 1), (neither, 0)):
        assert {name: direction(name) for name in names} == dict.fromkeys(names, sign)


def test_every_metric_that_is_shipped_is_known():
    from conftest import choices

    from diffx.compare.known import _KNOWN

    assert set(choices("metrics")) == {entry for _, entry in _KNOWN.values()} - {"likelihood"}


def test_the_default_metric_is_a_frechet_distance():
    assert metric_of(["is_digits", "fd_digits_floor", "fd_digits", "nn_ratio"]) == "fd_digits"
    assert metric_of(["nn_ratio", "is_digits"]) == "is_digits"
    assert metric_of(["nn_ratio"]) == "nn_ratio"


# ---- rows ----


def test_arms_are_rows_with_means_and_paired_differences(two):
    found = compared(two)
    assert found.metric == "fd_digits" and found.columns == ["schedule"] and found.direction == -1
    cosine, linear = found.rows
    assert cosine.is_baseline and cosine.effect is None and cosine.arm == {"schedule": "cosine"}
    assert cosine.mean.interval == pytest.approx(stats.t.interval(0.95, 2, np.mean(COSINE), stats.sem(COSINE)))
    reference = stats.ttest_rel(LINEAR, COSINE)
    assert linear.effect.interval == pytest.approx(tuple(reference.confidence_interval()))
    assert linear.p == pytest.approx(reference.pvalue) and linear.verdict == "worse"
    assert linear.effect_seeds == (0, 1, 2) and linear.effect.over == "seeds"
    assert {seed: v.value for seed, v in linear.values.items()} == dict(enumerate(LINEAR))
    assert linear.nfe == 10 and linear.images_per_second == 200
    assert "steps" in found.budget.equal and "images" in found.budget.equal and "FLOPs" in found.budget.unknown


@pytest.mark.parametrize(("metric", "verdict"), [("fd_digits", "worse"), ("is_digits", "better"), ("nn_ratio", "")])
def test_the_verdict_follows_the_direction(tmp_path, metric, verdict):
    write_arm(tmp_path, COSINE, metric, schedule="cosine")
    write_arm(tmp_path, LINEAR, metric, schedule="linear")
    found = compared(tmp_path, metric)
    assert found.rows[1].verdict == verdict and found.rows[1].effect is not None
    assert ("no verdicts" in render(found, "markdown")) == (not verdict)


def test_verdicts_are_corrected_for_the_number_of_rows(tmp_path):
    write_arm(tmp_path, COSINE, optimizer={"lr": 0.0})
    write_arm(tmp_path, LINEAR, optimizer={"lr": 1.0})
    alone = compared(tmp_path).rows[1].p
    for k in range(2, 7):
        write_arm(tmp_path, [5.1 + 0.1 * k, 5.2, 6.0], optimizer={"lr": float(k)})
    found = compared(tmp_path)
    raw = [stats.ttest_rel([v.value for v in row.values.values()], COSINE).pvalue for row in found.rows[1:]]
    assert [row.p for row in found.rows[1:]] == pytest.approx(holm(raw)) and found.tests == 6
    assert alone <= 0.05 < found.rows[1].p and found.rows[1].verdict == "not distinguishable"


def test_numbers_are_in_the_order_of_their_size(tmp_path):
    for lr in (0.1, 1e-4, 10.0, 2):
        write_arm(tmp_path, [1.0, 2.0], optimizer={"lr": lr})
    assert [row.arm["optimizer.lr"] for row in compared(tmp_path).rows] == [1e-4, 0.1, 2, 10.0]


def test_one_seed_is_compared_over_samples_and_says_so(tmp_path):
    write_arm(tmp_path, [5.0], schedule="cosine")
    write_arm(tmp_path, [6.0], schedule="linear")
    found = compared(tmp_path)
    assert found.rows[1].effect.over == found.rows[0].mean.over == "samples"
    text = render(found, "markdown")
    assert "not over training seeds" in text and r"\*" in text.splitlines()[2]


def test_two_seeds_have_the_wide_interval_of_one_degree_of_freedom(tmp_path):
    write_arm(tmp_path, [5.0, 5.2], schedule="cosine")
    write_arm(tmp_path, [6.0, 6.4], schedule="linear")
    found = compared(tmp_path)
    assert found.rows[0].mean.half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert found.rows[1].verdict == "not distinguishable" and "t = 12.7" in render(found, "markdown")


def test_only_seeds_that_both_have_are_compared(tmp_path):
    write_arm(tmp_path, [5.0, 5.5, 6.1], schedule="cosine")
    write_arm(tmp_path, [6.0, 6.6], schedule="linear")
    found = compared(tmp_path)
    assert found.rows[1].effect_seeds == (0, 1) and said(found, "seeds that both have", "linear")
    config = config_of(9, schedule={"_target_": "diffx.schedules.Sigmoid"})
    write_evaluation(write_run(tmp_path, config), config, value(1.0))
    found = compared(tmp_path)
    assert said(found, "no seed in common with the baseline", "Sigmoid") and len(found.rows) == 3


# ---- ways of sampling ----


@pytest.fixture
def sampled(tmp_path):
    """Two arms of two seeds, each measured with 5, 10 (its own) and 20 steps."""
    for level, schedule in enumerate(("cosine", "linear")):
        for seed in (0, 1):
            config = config_of(seed, schedule=schedule)
            run = write_run(tmp_path, config)
            for steps in (5, 10, 20):
                settings = {"sampler": config["sampler"] | {"steps": steps}}
                write_evaluation(run, config, value(level + 10 / steps + seed), settings=settings)
    return tmp_path


def test_arms_times_points_are_rows_and_the_baseline_is_at_the_same_point(sampled):
    found = compared(sampled)
    assert found.columns == ["schedule", "sampler.steps"] and len(found.rows) == 6
    assert [row.nfe for row in found.rows] == [5, 10, 20] * 2
    assert [row.is_baseline for row in found.rows] == [True] * 3 + [False] * 3
    assert all(row.effect.value == pytest.approx(1.0) for row in found.rows[3:])


def test_by_arms_alone_takes_each_runs_own_way_of_sampling(sampled):
    found = compared(sampled, by=["schedule"])
    assert found.columns == ["schedule"] and [row.nfe for row in found.rows] == [10, 10]
    assert said(found, "8 further evaluations", "--by sampler.steps")


def test_a_point_can_be_selected(sampled):
    found = compare(read_runs(sampled).where({"sampler.steps": ["20"]}))
    assert found.columns == ["schedule"] and [row.nfe for row in found.rows] == [20, 20]


def test_ways_of_sampling_one_arm_are_compared_over_its_seeds(sampled):
    found = compare(read_runs(sampled).where({"schedule": ["cosine"]}), baseline="sampler.steps=20")
    assert found.columns == ["sampler.steps"]
    assert [row.effect and row.effect.value for row in found.rows] == pytest.approx([1.5, 0.5, None])


# ---- baselines ----


@pytest.fixture
def grid(tmp_path):
    """Two by two arms of two seeds."""
    for k, (schedule, parameterization) in enumerate((s, p) for s in ("cosine", "linear") for p in ("eps", "v")):
        write_arm(tmp_path, [k + 1.0, k + 2.0 + k * k / 10], schedule=schedule, parameterization=parameterization)
    return tmp_path


def test_a_baseline_of_one_axis_is_at_the_same_value_of_the_other(grid):
    found = compared(grid, baseline="schedule=cosine")
    assert [row.is_baseline for row in found.rows] == [True, True, False, False]
    assert [row.effect.value for row in found.rows[2:]] == pytest.approx([2.2, 2.4])


@pytest.mark.parametrize(
    "asked", ["schedule=linear,parameterization=v", "linear,v", {"schedule": "linear", "parameterization": "v"}]
)
def test_a_baseline_of_all_axes_is_one_row(grid, asked):
    found = compared(grid, baseline=asked)
    assert [row.is_baseline for row in found.rows] == [False, False, False, True]
    assert found.rows[0].effect.value == pytest.approx(-3.45)


def test_the_first_row_is_the_baseline_unless_another_is_named(grid):
    found = compared(grid)
    assert found.rows[0].is_baseline and said(
        found, "no --baseline was named", "the first arm", "schedule=cosine, parameterization=eps"
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("schedule=cosin", "did you mean 'cosine'"),
        ("shedule=cosine", "did you mean 'schedule'"),
        ("cosin", "did you mean 'cosine'"),
        ("edm", "no row has edm"),
    ],
)
def test_an_unknown_baseline_is_one_sentence(grid, asked, words):
    with pytest.raises(DiffxError, match=re.escape(words)):
        compared(grid, baseline=asked)


def test_a_value_of_two_axes_has_to_be_told_apart(tmp_path):
    for a, b in ((1, 2), (2, 1)):
        write_arm(tmp_path, [1.0, 2.0], optimizer={"beta": a, "decay": b})
    with pytest.raises(DiffxError, match=r"'1' can be optimizer.beta or optimizer.decay"):
        compared(tmp_path, baseline="1")


# ---- what is wrong is named, and the rest is shown ----


def test_what_by_does_not_name_stays_apart_and_is_named(grid):
    found = compared(grid, by=["schedule"])
    assert len(found.rows) == 4 and found.columns == ["schedule", "parameterization"]
    assert said(found, "parameterization", "which --by does not name")


@pytest.mark.parametrize(
    ("metric", "by", "words"),
    [
        ("fd_digit", None, "no metric 'fd_digit' (did you mean 'fd_digits'?); measured are fd_digits"),
        ("fd_digits", ["shedule"], "no axis 'shedule' (did you mean 'schedule'?); these runs differ in schedule"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest_and_a_list(two, metric, by, words):
    with pytest.raises(DiffxError, match=re.escape(words)):
        compared(two, metric, by)


def test_an_axis_that_does_not_differ_is_named(two):
    found = compared(two, by=["schedule", "parameterization"])
    assert found.columns == ["schedule"] and said(found, "parameterization is the same in all")


def test_unfinished_runs_are_named(two):
    for state, seed in (("interrupted", 7), ("running", 8)):
        write_run(two, config_of(seed), state=state, step=30)
    found = compared(two)
    assert said(found, "not finished", "seed7 (interrupted, step 30 of 100)", "seed8 (running")
    assert len(found.rows[0].values) == 3


def test_finished_runs_without_an_evaluation_are_named(two):
    run = write_run(two, config_of(7))
    assert str(run.path) in said(compared(two), "no evaluation of the last step", "diffx evaluate run=")


def test_earlier_steps_are_not_mixed_with_the_end(two):
    config = config_of(3)
    run = write_run(two, config)
    write_evaluation(run, config, value(99.0), step=50)
    found = compared(two)
    assert said(found, "1 evaluation of earlier training steps")
    assert all(v.value < 10 for row in found.rows for v in row.values.values())
    # nor while the training goes on, whatever it says of its end
    unfinished = config_of(4)
    write_evaluation(write_run(two, unfinished, state="running", step=60), unfinished, value(99.0), step=60)
    assert all(v.value < 10 for row in compared(two).rows for v in row.values.values())


def test_the_best_weights_are_a_row_of_their_own(tmp_path):
    for seed in (0, 1):
        config = config_of(seed)
        run = write_run(tmp_path, config)
        write_evaluation(run, config, value(2.0 + seed))
        write_evaluation(run, config, value(1.0 + seed), step=50, settings={"weights": "best"})
    found = compared(tmp_path)
    assert found.columns == ["weights"] and {row.point["weights"]: len(row.values) for row in found.rows} == {
        "best": 2, "ema": 2,
    }  # fmt: skip


def test_a_run_that_spent_its_device_seconds_early_has_ended(tmp_path):
    config = config_of()
    write_evaluation(write_run(tmp_path, config, step=70), config, value(1.0), step=70)
    assert len(compared(tmp_path).rows[0].values) == 1


def test_copied_folders_count_once(two):
    source = next(iter(sorted(two.glob("ablation/*"))))
    shutil.copytree(source, two / "copy" / source.name)
    found = compared(two)
    assert all(len(row.values) == 3 for row in found.rows)
    assert sum("the same arm and seed again" in note and "used: " in note for note in found.notes) == 3


def test_a_metric_that_some_lack_is_shown_as_missing_and_named(two):
    config = config_of(0, schedule={"_target_": "diffx.schedules.Sigmoid"})
    write_evaluation(write_run(two, config), config, value(9.0, name="is_digits"))
    found = compared(two, "fd_digits")
    row = row_of(found, schedule="Sigmoid")
    assert row.mean is None and not row.values and row.verdict == ""
    assert said(found, "fd_digits was not measured of schedule=Sigmoid")
    line = next(line for line in render(found, "markdown").splitlines() if "Sigmoid" in line)
    assert line.startswith("| Sigmoid | 0 of 1 | – | – |")


def test_ways_of_sampling_without_the_metric_are_no_rows(two):
    run = next(iter(read_runs(two).members))
    settings = {"sampler": run.config["sampler"] | {"steps": 50}}
    write_evaluation(run.run, run.config, value(9.0, name="nn_ratio"), settings=settings)
    assert [row.nfe for row in compared(two, "fd_digits").rows] == [10, 10]


def test_nan_is_named_and_not_averaged(tmp_path):
    write_arm(tmp_path, COSINE, schedule="cosine")
    write_arm(tmp_path, [5.6, 5.9], schedule="linear")
    config = config_of(2, schedule="linear")
    broken = Value("fd_digits", math.nan, None, 1000, "", "undefined: features are not finite")
    write_evaluation(write_run(tmp_path, config), config, broken)
    found = compared(tmp_path)
    row = row_of(found, schedule="linear")
    assert row.mean.value == pytest.approx(5.75) and set(row.values) == {0, 1} and len(row.runs) == 3
    assert said(found, "schedule=linear, seed 2: fd_digits is nan (undefined: features are not finite)")
    assert "2 of 3" in render(found, "markdown")


def test_a_diverged_arm_has_no_verdict(tmp_path):
    write_arm(tmp_path, COSINE, schedule="cosine")
    write_arm(tmp_path, [math.nan, math.inf], schedule="linear")
    row = row_of(compared(tmp_path), schedule="linear")
    assert row.mean is None and row.effect is None and row.verdict == ""


def test_damaged_records_are_named(two):
    (file,) = [sorted(two.glob("ablation/*/seed2/evaluations/*.json"))[0]]
    file.write_text("{")
    found = compared(two)
    assert said(found, str(file), "damaged") and sorted(len(row.values) for row in found.rows) == [2, 3]


def test_a_protocol_changed_by_hand_is_named(two):
    assert not any("by hand" in note for note in compared(two).notes)
    (file,) = [sorted(two.glob("ablation/*/seed2/evaluations/*.json"))[0]]
    file.write_text(file.read_text().replace('"quantization": "uint8"', '"quantization": "uint8" , "bits": 8'))
    assert str(file) in said(compared(two), "edited by hand")


# ---- rulers ----

OTHER_RULERS = {
    "extractor": {"extractor": "inception"},
    "weights_hash": {"weights_hash": "ff" * 32},
    "preprocessing": {"preprocessing": "bicubic"},
    "quantization": {"quantization": "none"},
    "reference.split": {"reference": {"data": "digits", "split": "train", "images": 360, "fingerprint": "cd" * 16}},
    "metrics._target_": {"metrics": {"fd": {"_target_": "mypkg.Distance"}}},
    "sample_seed": {"sample_seed": 1},
    "num_samples": {"num_samples": 500},
}


@pytest.mark.parametrize("key", OTHER_RULERS)
def test_values_by_another_ruler_are_refused_or_marked(two, key):
    for seed in (0, 1):
        config = config_of(seed, schedule={"_target_": "diffx.schedules.Sigmoid"})
        write_evaluation(write_run(two, config), config, value(1.0 + seed), **OTHER_RULERS[key])
    with pytest.raises(DiffxError, match="not measured equally") as error:
        compared(two)
    assert key in str(error.value) and "schedule=Sigmoid" in str(error.value) and "--allow-mismatch" in str(error.value)
    found = compared(two, allow_mismatch=True)
    row = row_of(found, schedule="Sigmoid")
    assert row.mismatch and key in row.mismatch[0] and row.verdict == "" and row.p is None
    assert row_of(found, schedule="linear").p == pytest.approx(stats.ttest_rel(LINEAR, COSINE).pvalue)
    text = render(found, "markdown")
    assert (
        "measured otherwise †" in text
        and f"† measured otherwise, and not comparable with the others: {row.name}" in text
    )


def test_another_metric_set_otherwise_is_no_other_ruler(two):
    config = config_of(0, schedule={"_target_": "diffx.schedules.Sigmoid"})
    metrics = {"fd": {"_target_": "diffx.metrics.FrechetDistance"}, "kid": {"subsets": 5}}
    write_evaluation(write_run(two, config), config, value(1.0), metrics=metrics)
    assert len(compared(two).rows) == 3


def test_of_what_all_have_the_larger_measurement_is_taken(tmp_path):
    for k, schedule in enumerate(("cosine", "linear")):
        for seed in (0, 1):
            config = config_of(seed, schedule=schedule)
            run = write_run(tmp_path, config)
            for n in (500, 5000, 1000):
                write_evaluation(run, config, value(k + seed + 1000 / n, n=n))
    found = compared(tmp_path)
    assert {v.n for row in found.rows for v in row.values.values()} == {5000}
    assert said(found, "measured more than once", "8 evaluations left out, num_samples 5000 used")
    chosen = compare(read_runs(tmp_path).where({"evaluation.num_samples": ["500"]}))
    assert {v.n for row in chosen.rows for v in row.values.values()} == {500}


def test_the_newest_of_equal_measurements_is_taken(tmp_path):
    config = config_of()
    run = write_run(tmp_path, config)
    write_evaluation(run, config, value(2.0), time="2026-02-01", times="b")
    write_evaluation(run, config, value(1.0), time="2026-01-01", times="a")
    assert compared(tmp_path).rows[0].mean.value == 2.0


# ---- budgets ----


def test_the_budget_that_was_equal_is_told():
    spent = {"steps": [100, 200], "images": [6400, 6400], "FLOPs": [1e15, 1.005e15], "device-seconds": [60.0, 90.0]}
    budget = Budget(spent, "GPU")
    assert budget.equal == ["images", "FLOPs"] and budget.unequal == ["steps", "device-seconds"]
    assert str(budget) == (
        "training budget: equal in 6,400 images, 1e+15 FLOPs (within 1%); "
        "unequal in steps (100 … 200), GPU-seconds (60 … 90)"
    )
    assert str(Budget({"steps": [1, 2]})).endswith("images and FLOPs and device-seconds not logged")
    assert str(Budget({})) == "training budget: unknown"


def test_costs_are_read_from_the_training_log(two):
    for k, member in enumerate(read_runs(two).members):
        rows = ["step,loss,images,images_per_second,flops,device_seconds", "50,1,3200,10,5e11,1800"]
        rows += [f"100,1,6400,30,1e12,{3600 * (1 + k // 3)}", "100,,,,,"]
        (member.run.path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = compared(two)
    assert sorted(row.device_hours for row in found.rows) == [1.0, 2.0]
    assert all(row.images_per_second == 20 for row in found.rows)
    assert found.budget.equal == ["steps", "images", "FLOPs"] and found.budget.unequal == ["device-seconds"]
    assert "device-hours" in render(found, "markdown").splitlines()[0]
    assert not any("training log" in note for note in found.notes)


def test_without_costs_in_the_log_the_column_is_left_out_with_a_note(two):
    found = compared(two)
    assert "device-hours" not in render(found, "markdown").splitlines()[0] and said(
        found, "device-hours", "training log"
    )


# ---- tables ----


def test_numbers_are_rounded_to_two_digits_of_their_interval():
    assert rounded(2.35712, 0.2514) == ("2.36", "0.25")
    assert rounded(1189.32, 11.18) == ("1189", "11")
    assert rounded(0.97843, 0.00543) == ("0.9784", "0.0054")
    assert rounded(-0.5, 12.7) == ("−0" if rounded(-0.5, 12.7)[0] == "−0" else "0", "13")
    assert rounded(2.35712, None) == ("2.357", "")


def test_the_csv_has_every_number(two):
    found = compared(two)
    (cosine, linear) = csv.DictReader(io.StringIO(render(found, "csv", best_seed=True)))
    assert float(linear["mean"]) == found.rows[1].mean.value and float(linear["high"]) == found.rows[1].mean.interval[1]
    assert float(linear["p_holm"]) == found.rows[1].p and linear["verdict"] == "worse"
    assert linear["values"] == "0:5.6;1:5.9;2:6.6" and linear["interval_over"] == "seeds"
    assert (cosine["best_of_seeds"], cosine["best_seed"], cosine["difference"]) == ("5.0", "0", "")


def test_latex_is_escaped_and_whole(two):
    text = render(compared(two), "latex")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii() and not re.search(r"(?<!\\)[%#]", body) and not re.search(r"(?<!\\)_", body)
    assert body.count("{") == body.count("}") and body.replace(r"\$", "").count("$") % 2 == 0
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
        assert body.count(rule) == 1
    table = body.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    columns = len(re.search(r"begin{tabular}{([lr]+)}", body).group(1))
    assert len(table) == 2 and all(line.count("&") == columns - 1 and line.endswith(r"\\") for line in table)
    assert r"$\pm$" in body and r"fd\_digits $\downarrow$" in body


def test_markdown_has_as_many_cells_in_each_row(two):
    lines = [line for line in render(compared(two), "markdown", best_seed=True).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_the_best_seed_is_labelled(two):
    text = render(compared(two), "markdown", best_seed=True)
    assert "best of seeds" in text and "5 (seed 0, of 3)" in text and "by chance" in text
    assert "best of seeds" not in render(compared(two), "markdown")


def test_floors_are_told_below_the_table(two):
    member = read_runs(two).members[0]
    write_evaluation(member.run, member.config, value(5.0), value(2.05, name="fd_digits_floor"), time="2027")
    assert "real images in place of samples have fd_digits 2.05" in render(compared(two), "latex").replace("\\", "")


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv"])
def test_a_pivot_has_one_axis_across(grid, form):
    text = render(compared(grid), form, pivot=True)
    assert "parameterization=eps" in text and "parameterization=v" in text
    line = next(line for line in text.splitlines() if "linear" in line and "fd" not in line)
    assert "not distinguishable" in line and line.count("±" if form != "latex" else r"\pm") == 2


def test_a_pivot_of_other_than_two_axes_says_what_to_do(two):
    with pytest.raises(DiffxError, match=r"takes two axes, but the rows differ in schedule; name two with --by"):
        render(compared(two), "markdown", pivot=True)


# ---- the command ----


def test_the_command_as_typed(capsys, grid, tmp_path):
    argv = ["compare", str(grid), "--metric", "fd_digits", "--by", "schedule,parameterization"]
    code, out, err = diffx(capsys, *argv)
    assert code == 0, err
    assert "fd_digits ↓" in out and "baseline" in out and out.count("linear") >= 2
    for words in (["--pivot", "--format", "latex"], ["--pivot", "--format=latex"], ["pivot=true", "format=latex"]):
        assert r"\toprule" in diffx(capsys, *argv, *words)[1]
    code, out, _ = diffx(capsys, *argv, "--out", str(tmp_path / "t" / "table.md"), "--best-seed", "schedule=linear")
    text = (tmp_path / "t" / "table.md").read_text()
    assert code == 0 and "table.md" in out and "best of seeds" in text and "| linear |" not in text and "| v |" in text
    assert diffx(capsys, *argv, "--baseline", "linear,v")[0] == 0


def test_several_metrics_are_several_tables_and_one_csv(capsys, tmp_path):
    for schedule in ("cosine", "linear"):
        config = config_of(schedule=schedule)
        write_evaluation(write_run(tmp_path, config), config, value(1.0), value(9.0, name="is_digits"))
    _, out, _ = diffx(capsys, "compare", str(tmp_path), "--metric", "fd_digits,is_digits", "--format", "csv")
    assert [row["metric"] for row in csv.DictReader(io.StringIO(out))] == ["fd_digits"] * 2 + ["is_digits"] * 2
    _, out, _ = diffx(capsys, "compare", str(tmp_path), "--metric", "fd_digits,is_digits")
    assert "fd_digits ↓" in out and "is_digits ↑" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--metrik", "fd"], "there is no option '--metrik' (did you mean '--metric'?)"),
        (["--metric"], "--metric lacks its value"),
        (["--format", "latec"], "no format 'latec' (did you mean 'latex'?)"),
        (["--out", "table.doc"], "does not say its format"),
        (["--pivot=3"], "--pivot is on or off"),
        (["shedule=cosine"], "no key 'shedule' in these runs (did you mean 'schedule'?)"),
        (["schedule=edm"], "no run has schedule=edm; there is schedule=cosine,linear"),
        (["--by", "schedul"], "no axis 'schedul' (did you mean 'schedule'?)"),
        (["--metric", "fid"], "there is no metric 'fid'"),
        (["--pivot", "--by", "schedule", "parameterization=v"], "--pivot takes two axes"),
        (["nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, grid, words, sentence):
    code, _, err = diffx(capsys, "compare", str(grid), *words)
    assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1


def test_nothing_measured_is_one_sentence(capsys, tmp_path):
    write_run(tmp_path, config_of())
    code, _, err = diffx(capsys, "compare", str(tmp_path))
    assert code == 2 and "none of these runs has an evaluation" in err and "diffx evaluate run=" in err
    code, _, err = diffx(capsys, "compare", str(tmp_path / "ablation" / ".."), "seed=4")
    assert code == 2 and "no run has seed=4" in err
