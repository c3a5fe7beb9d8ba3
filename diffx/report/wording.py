"""Sentences of the page that follow from what was run."""

from collections.abc import Mapping, Sequence

from diffx.compare.arms import text
from diffx.experiment import Collection
from diffx.report.aim import aim
from diffx.report.arms import Arm
from diffx.report.cost import Point
from diffx.report.numbers import count, listed

_SCALE = ("parameterization", "weighting", "objective", "schedule", "time_sampler", "data", "autoencoder")
"""Groups that change what the loss is a mean of."""

_METRICS = {
    "fid": "Fréchet distance between Inception features of samples and of real images; 0 is a perfect match.",
    "fd": "Fréchet distance between features of samples and of real images; 0 is a perfect match. The word behind fd_ "
    "is the network whose features these are: values of different networks cannot be compared.",
    "kid": "Kernel distance between Inception features of samples and of real images; 0 is a perfect match.",
    "is": "Inception Score: samples that are easy to classify and spread over all classes score high.",
    "precision": "Share of samples that lie among the real images; high where samples look real.",
    "recall": "Share of real images that lie among the samples; high where nothing is left out.",
    "class_consistency": "Share of samples whose most probable class is the one that was asked for.",
    "nn_ratio": "Distance of samples to the nearest training image, over that of held-out images; near 0 where "
    "training images are copied.",
}


def question_of(collection: Collection, levels: Mapping[str, Sequence[str]], metric: str) -> str:
    """The question that a sweep asks.

    Arguments:
        collection: the runs.
        levels: the levels of each axis.
        metric: what is asked about.
    """
    names = sorted({str(member.config["name"]) for member in collection.members})
    if not levels:
        return f"What {metric} does {listed(names)} reach?"
    parts = [f"{axis} ({_choices(found)})" for axis, found in levels.items()]
    verb = "Does" if len(levels) == 1 else "Do"
    return f"{verb} {listed(parts)} change {metric} on {listed(names)}{_after(collection)}?"


def _choices(levels: Sequence[str]) -> str:
    found = list(dict.fromkeys(levels))
    return listed(found, "or") if len(found) <= 6 else f"{len(found)} values"


def _after(collection: Collection) -> str:
    """How long all arms were trained, where that is the same."""
    trainings = [member.config.get("training", {}) for member in collection.members]
    for key, words in (("max_images", "images"), ("max_flops", "FLOPs"), ("max_steps", "steps")):
        amounts = {training.get(key) for training in trainings}
        if amounts == {None}:
            continue
        amount = next(iter(amounts))
        return f" after {amount:,.6g} training {words}" if len(amounts) == 1 else ""
    return ""


def incomparable_losses(axes: Sequence[str]) -> str:
    """Why the losses of the arms are not on one scale; empty if they are."""
    found = [axis for axis in axes if axis.partition(".")[0] in _SCALE]
    if not found:
        return ""
    return (
        f"Losses of arms that differ in {listed(found)} are means of different things: that one is lower does not make "
        "an arm better. The metric decides."
    )


def cost_remarks(sampled: Sequence[Point], metric: str) -> list[str]:
    """What is missing from the plot of quality against cost."""
    numbers = sorted({point.costs["NFE"] for point in sampled if "NFE" in point.costs})
    if not sampled:
        return [f"No run has a value of {metric}, so there is nothing to set against its cost."]
    if len(numbers) == 1:
        return [
            f"All values are at NFE {numbers[0]:g}; diffx evaluate -m run='FOLDER/*/*/seed*' sampler.steps=5,10,20 "
            "measures others without training again."
        ]
    return []


def words_of(metric: str) -> list[tuple[str, str]]:
    """What the words on the page mean."""
    short = metric if metric in _METRICS else metric.partition("_")[0]
    meaning = _METRICS.get(short, "The metric that arms are compared by.")
    return [
        (metric, f"{meaning} Here {aim(metric)}."),
        ("arm", "One combination of settings. Its runs differ in their training seed only."),
        ("seed", "The number that fixes all randomness of a training: initial weights, order of images, noise."),
        ("baseline", "The arm that all others are held against."),
        ("interval, 95 %", "Made so that 95 of 100 such intervals contain the true value."),
        (
            "not distinguishable",
            "The difference could be chance: as large a one is to be expected of these few runs.",
        ),
        ("NFE", "Number of function evaluations: how often the network is called to make one sample."),
        ("logSNR", "Logarithm of the signal-to-noise ratio α²/σ²: low is nearly noise, high nearly a clean image."),
        ("marginal mean", "The mean over all combinations of the other axes, each counted once."),
        ("interaction", "What one axis does depends on the level of another one."),
    ]


def runs_caption(collection: Collection, arms: Sequence[Arm]) -> str:
    """How many runs there are, and what became of them."""
    states: dict[str, int] = {}
    for member in collection.members:
        states[member.state] = states.get(member.state, 0) + 1
    said = listed([f"{n} {state}" for state, n in sorted(states.items(), key=lambda item: (-item[1], item[0]))])
    return f"{count(len(collection), 'run')} of {count(len(arms), 'arm')}: {said}"


def differences(axes: Mapping[str, Mapping[str, object]]) -> str:
    """What arms differ in, with the values."""
    parts = []
    for axis, values in axes.items():
        levels = sorted({text(value) for value in values.values()})
        parts.append(f"{axis} ({_choices(levels)})")
    return listed(parts) if parts else "nothing but their seeds"
