"""Sentences of the page that follow from what was run."""

from collections.abc import Mapping, Sequence

from diffx.experiment import Collection
from diffx.report.arms import Arm, level
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
    "nn_ratio": "Distance of samples to the nearest training image, over that of held-out images; near 0 where training "
    "images are copied.",
}


def question_of(collection: Collection, axes: Sequence[str], arms: Sequence[Arm], metric: str) -> str:
    """The question that a sweep asks."""
    names = sorted({str(member.config["name"]) for member in collection.members})
    if not axes:
        return f"What {metric} does {listed(names)} reach?"
    parts = [f"{axis} ({_choices([arm.levels[axis] for arm in arms])})" for axis in axes]
    return (
        f"{'Does' if len(axes) == 1 else 'Do'} {listed(parts)} change {metric} on {listed(names)}{_after(collection)}?"
    )


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


def words_of(metric: str, lower_is_better: bool) -> list[tuple[str, str]]:
    """What the words on the page mean."""
    short = metric if metric in _METRICS else metric.partition("_")[0]
    direction = "lower is better" if lower_is_better else "higher is better"
    meaning = _METRICS.get(short, "The metric that arms are compared by.")
    return [
        (metric, f"{meaning} Here {direction}."),
        ("arm", "One combination of settings. Its runs differ in their training seed only."),
        ("seed", "The number that fixes all randomness of a training: initial weights, order of images, noise."),
        ("baseline", "The arm that all others are held against."),
        ("interval, 95 %", "Made so that 95 of 100 such intervals contain the true value."),
        (
            "not distinguishable",
            "The interval of the difference contains 0: these runs cannot tell the two arms apart.",
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
        levels = sorted({level(value) for value in values.values()})
        parts.append(f"{axis} ({_choices(levels)})")
    return listed(parts) if parts else "nothing but their seeds"
