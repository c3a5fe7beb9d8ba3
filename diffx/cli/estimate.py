"""How long arms would take on this machine, from a little of each."""

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffx.cli.build import Arm, build, check, final_points, points
from diffx.cli.measure import best_device
from diffx.cli.switches import switch_on, variants
from diffx.data import DataSource
from diffx.data.base import SplitName
from diffx.data.stream import GlobalBatches
from diffx.experiment import Run, fingerprint, identity
from diffx.experiment.cost import Cost, Speed, cost, remaining
from diffx.experiment.run import step_of
from diffx.metrics.cache import Cache
from diffx.training.callbacks import Point
from diffx.training.data import StreamData
from diffx.training.flops import training_flops
from diffx.training.log import TrainingLog
from diffx.training.nonfinite import NonFinite
from diffx.training.probe import (
    TrainingSpeed,
    probe_extraction,
    probe_sampling,
    probe_training,
)
from diffx.utils import DiffxError

Config = dict[str, Any]

SECONDS = 10.0
"""How long training steps are timed; sampling and measuring take up to half as long each."""


@dataclass(frozen=True)
class Estimate:
    """What is known about the cost of a run.

    Arguments:
        device: `cuda` or `cpu`: what its hours are hours of.
        images_per_step: the global batch.
        finished: whether nothing is left to do.
        speed: what was tried out; None if nothing was.
        cost: what is left to do takes; None if nothing was tried out.
        left_out: what is not in it, in words.
        problem: why nothing could be tried out, in words.
    """

    device: str
    images_per_step: int
    finished: bool = False
    speed: Speed | None = None
    cost: Cost | None = None
    left_out: tuple[str, ...] = ()
    problem: str = ""

    @property
    def images_per_second(self) -> float:
        """Training images per second, over all processes."""
        return self.images_per_step / self.speed.training.step if self.speed else float("nan")


def estimate(arms: Sequence[tuple[Run, Config]], seconds: float = SECONDS, start_up: float = 0.0) -> list[Estimate]:
    """Tries out runs, and tells how long what is left to do of each takes.

    Runs of one network, batch, data and precision are tried out once. Nothing is written but temporary files, and
    torch's random state stays as it is.

    Arguments:
        arms: run directories, existing or not, with their resolved configs.
        seconds: how long training steps are timed.
        start_up: seconds that a process takes before it does anything, importing.

    Returns:
        One for each run. What fails is told there and not raised.
    """
    known: dict[str, Any] = {}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training itself will warn
        return [_estimate(run, config, seconds, start_up, known) for run, config in arms]


@dataclass(frozen=True)
class Gain:
    """Training with one switch more than a config has.

    Arguments:
        words: what is to be typed; empty for the config as it is.
        images_per_second: in one process.
        memory: bytes at most.
        start: seconds before steps are that fast, compilation included.
        problem: why it could not be tried out, in words.
    """

    words: str
    images_per_second: float = float("nan")
    memory: int = 0
    start: float = float("nan")
    problem: str = ""


def gains(config: Config, seconds: float) -> list[Gain]:
    """Trains a little with each switch that a config leaves off, the first time with none of them.

    Arguments:
        config: the whole config.
        seconds: how long steps are timed, each time.
    """
    device, found = best_device(config["trainer"]["accelerator"]), []
    for words, changed in [("", config), *variants(config, device)]:
        torch.compiler.reset()
        try:
            speed, _ = _Probe(_alone(changed), torch.device(device), seconds, {}).training()
        except (DiffxError, RuntimeError) as error:
            found.append(Gain(words, problem=str(error).splitlines()[0]))
        else:
            images = changed["data"]["batch_size"] / speed.step
            found.append(Gain(words, images, speed.memory, speed.start))
    return found


def totals(runs: Sequence[Estimate]) -> list[str]:
    """What is left to do of all runs together, in a sentence; what could not be tried out, and what is not in it."""
    open_ = [run for run in runs if not run.finished]
    known = [(run.device, run.cost) for run in open_ if run.cost is not None]
    sentences = [f"{len(open_)} of {len(runs)} runs are to do"]
    for device, unit in (("cuda", "GPU"), ("cpu", "CPU")):
        found = [cost for name, cost in known if name == device]
        if found:
            part = "" if len(found) == len(open_) else f" for {len(found)} of them"
            hours, one_by_one = sum(c.device_hours for c in found), duration(sum(c.seconds for c in found))
            sentences[0] += f": {hours:.3g} {unit}-hours{part}, {one_by_one} one after the other"
    problems = dict.fromkeys(run.problem for run in open_ if run.problem)
    sentences += [f"not tried out: {problem}" for problem in problems]
    left_out = dict.fromkeys(words for run in open_ for words in run.left_out)
    return sentences + ([f"not in it: {'; '.join(left_out)}"] if left_out else [])


def duration(seconds: float) -> str:
    """Seconds with three digits, in the unit that suits."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _estimate(run: Run, config: Config, seconds: float, start_up: float, known: dict[str, Any]) -> Estimate:
    trainer = config["trainer"]
    processes, device = trainer["devices"] * trainer["num_nodes"], best_device(trainer["accelerator"])
    told = Estimate(device, config["data"]["batch_size"], finished=run.state == "finished")
    if told.finished:
        return told
    if device == "cuda" and not torch.cuda.is_available():
        return replace(told, problem="there is no GPU here to try it out on")
    checkpoint, _ = run.newest_checkpoint()
    try:
        probe = _Probe(_alone(config), torch.device(device), seconds, known)
        speed = probe.speed()
        speed = replace(speed, training=replace(speed.training, start=speed.training.start + start_up))
        work = remaining(config, step_of(checkpoint) if checkpoint else 0, probe.grid(), probe.compared())
    except DiffxError as error:
        return replace(told, problem=str(error))
    return replace(told, speed=speed, cost=cost(work, speed, processes), left_out=_left_out(config, processes))


def _size(source: DataSource, split: SplitName) -> int:
    """Images in a split; 0 where the data set has none."""
    try:
        return len(source.split(split))
    except DiffxError:
        return 0


def _alone(config: Config) -> Config:
    """What one of the processes does, as a run of its own."""
    trainer, data = config["trainer"], config["data"]
    processes = trainer["devices"] * trainer["num_nodes"]
    GlobalBatches(data["batch_size"], world_size=processes, accumulate=trainer["accumulate_grad_batches"])
    return config | {
        "data": data | {"batch_size": data["batch_size"] // processes},
        "trainer": trainer | {"devices": 1, "num_nodes": 1, "strategy": "auto"},
    }


def _left_out(config: Config, processes: int) -> tuple[str, ...]:
    """What a probe does not see."""
    found = []
    if processes > 1:
        found.append(f"what {processes} processes cost beyond one: communication, and cores that they share")
    if config["likelihood"]:
        found.append("bits per dimension")
    if config["logger"]:
        found.append(f"the logger {', '.join(config['logger'])}")
    return tuple(found)


class _Probe:
    """An arm, built, of which a little is done.

    Arguments:
        config: the config of one process.
        device: where it runs.
        seconds: how long steps are timed.
        known: what has been tried out for other arms; added to.
    """

    def __init__(self, config: Config, device: torch.device, seconds: float, known: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.arm: Arm = build(config)
        check(self.arm)
        self.loading = time.perf_counter() - began
        self.config = config
        self.device = device
        self.seconds = seconds
        self.known = known
        self.network = self._network()

    def speed(self) -> Speed:
        """What this process does."""
        if self.network not in self.known:
            self.known[self.network] = self.training()
        training, flops = self.known[self.network]
        self.arm.module.to(self.device)
        final = [Point(k, other.config["weights"], other.generator) for k, other in final_points(self.arm, {}).items()]
        sampling = {point.name: self._sampling(point) for point in (*points(self.arm), *final)}
        seconds = {name: each for name, (each, _) in sampling.items()}
        memory = max([training.memory, *(used for _, used in sampling.values())])
        training = replace(training, start=training.start + self.loading)
        return Speed(training, seconds, self._extraction(), memory, flops)

    def grid(self) -> int:
        """Images in a grid of samples."""
        classes = self.arm.source.num_classes if self.arm.module.conditioner.null(1) else 0
        per_class = self.config["evaluation"]["per_class"]
        return (min(classes, 20) or per_class) * per_class

    def compared(self) -> int:
        """Images that are measured beside the samples: those of the reference, unless cached, and of the baselines."""
        evaluator, source = self.arm.evaluator, self.arm.source
        if evaluator.split is None or not evaluator.extractor.dim:
            return 0
        reference = source.split(evaluator.split)
        cached = Cache(evaluator.extractor, reference.fingerprint()).path("statistics.npz").is_file()
        other = _size(source, "test" if evaluator.split == "train" else "train")
        floor_and_noise = 2 * min(other, 10_000) if "fd" in evaluator.metrics else 0
        return floor_and_noise + (0 if cached else len(reference))

    def training(self) -> tuple[TrainingSpeed, float]:
        """The speed of training, and its floating point operations per image."""
        config, trainer, source = self.config, self.config["trainer"], self.arm.source
        module = self.arm.module.to(self.device)
        flops = training_flops(module, next(iter(source.train_loader(config["seed"]))))
        switch_on(module, trainer, self.device)
        looks = (config["log_every_n_steps"], config["checkpoint"]["every_n_steps"])
        with tempfile.TemporaryDirectory(prefix="diffx-probe-") as name:
            folder = Path(name)
            nonfinite = NonFinite(config["training"]["nonfinite"], *looks, folder / "nonfinite.jsonl")
            speed = probe_training(
                module,
                StreamData(source, config["seed"], trainer["accumulate_grad_batches"]),
                self.device,
                folder,
                [TrainingLog(config["log_every_n_steps"]), nonfinite],
                seconds=self.seconds,
                **{key: config["training"][key] for key in ("precision", "gradient_clip_val")},
                **{key: trainer[key] for key in _TRAINER},
            )
        return speed, flops

    def _sampling(self, point: Point) -> tuple[float, int]:
        """Seconds per sample at a point, and the memory it takes."""
        settings = self.config["evaluation"]
        further = settings["interim_points"].get(point.name, settings.get("final_points", {}).get(point.name, {}))
        settings = self.config | further
        weights = "ema" if point.weights == "best" else point.weights
        generator = point.generator(self.arm.module.ema.named()[weights].eval())
        sampler = {key: value for key, value in settings["sampler"].items() if key != "steps"}
        batch = self.config["evaluation"]["batch_size"]
        # where a sampler finds its steps itself, how many depends on the grid
        grid = generator.times().tolist() if generator.nfe is None else None
        key = fingerprint([self.network, sampler, settings["guidance"], settings["thresholding"], batch, grid])
        if key not in self.known:
            self.known[key] = probe_sampling(generator, batch, self.device, seconds=self.seconds / 2)
        found = self.known[key]
        return (generator.nfe or found.calls) * found.call + found.decode, found.memory

    def _extraction(self) -> float:
        """Seconds per image that is measured."""
        settings, extractor = self.config["evaluation"], self.arm.evaluator.extractor
        if not (settings["num_samples"] or settings["interim_samples"]) or not extractor.dim:
            return 0.0
        key = fingerprint([self.config["extractor"], self.config["data"], settings["batch_size"]])
        if key not in self.known:
            images = self.arm.source.split("train")
            batch = images.get(torch.arange(min(settings["batch_size"], len(images))))["x"]
            self.known[key] = probe_extraction(extractor, batch, self.device, seconds=self.seconds / 2)
        return self.known[key]

    def _network(self) -> str:
        """What the speed of training depends on.

        Schedules, weightings and rates cost next to nothing; those that are trained are known by their parameters.
        """
        config = self.config
        parts = {key: value for key, value in identity(config).items() if key not in _FREE}
        parts["optimizer"] = {k: v for k, v in config["optimizer"].items() if not isinstance(v, float | list)}
        parts["training"] = {key: config["training"][key] for key in ("precision", "gradient_clip_val", "nonfinite")}
        trained = sum(p.numel() for p in self.arm.module.parameters() if p.requires_grad)
        return fingerprint([parts, config["trainer"], config["log_every_n_steps"], str(self.device), trained])


_TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")
_FREE = {"name", "schedule", "parameterization", "weighting", "time_sampler", "lr_schedule"}
