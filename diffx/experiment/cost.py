"""From what a config asks for and how fast a machine is to hours."""

from dataclasses import dataclass
from typing import Any

from diffx.training.probe import TrainingSpeed


@dataclass(frozen=True)
class Work:
    """What is left to do of a run.

    Arguments:
        steps: optimizer steps.
        checkpoints: how often one is written.
        samples: images to sample, by the name of the point in `evaluation.interim` or `evaluation.final`; "" for the
            run's own settings.
        measured: images that go through the extractor.
    """

    steps: int
    checkpoints: int
    samples: dict[str, int]
    measured: int


@dataclass(frozen=True)
class Speed:
    """What one process does on this machine.

    Arguments:
        training: of training, with this process's share of the batch.
        sampling: seconds per sample, by the names of the points.
        extraction: seconds per measured image.
        memory: bytes at most, in training and sampling.
        flops: floating point operations of training per image, forward and backward.
    """

    training: TrainingSpeed
    sampling: dict[str, float]
    extraction: float
    memory: int
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Arguments:
        training: seconds of training.
        evaluation: seconds of sampling and measuring, in training and after it.
        processes: devices that it takes them on.
    """

    training: float
    evaluation: float
    processes: int

    @property
    def seconds(self) -> float:
        """Seconds from its start to its end."""
        return self.training + self.evaluation

    @property
    def device_hours(self) -> float:
        """GPU-hours, or CPU-hours."""
        return self.seconds * self.processes / 3600


def remaining(config: dict[str, Any], step: int, grid: int, compared: int) -> Work:
    """What is left to do of a run.

    Arguments:
        config: its resolved config.
        step: optimizer steps done.
        grid: images in a grid of samples.
        compared: images that are measured beside the samples at the end.
    """
    settings, last = config["evaluation"], config["training"]["max_steps"]
    interim, final, every = settings["interim_samples"], settings["num_samples"], settings["every_n_steps"]
    saving = config["checkpoint"]["every_n_steps"]
    looks = max(0, (last - 1) // every - step // every) if every else 0  # at the end there is the final evaluation
    samples = {"": looks * (grid + interim) + grid + final}
    samples |= dict.fromkeys(settings["interim_points"], looks * interim)
    measured = looks * interim * len(samples) + (final + compared if final else 0)
    for name, point in settings.get("final_points", {}).items() if final else ():
        wanted = point.get("evaluation", settings)["num_samples"]
        samples[name] = samples.get(name, 0) + wanted
        measured += wanted
    return Work(
        steps=max(0, last - step),
        checkpoints=-(-last // saving) - step // saving if step < last else 0,
        samples=samples,
        measured=measured,
    )


def cost(work: Work, speed: Speed, processes: int) -> Cost:
    """What work takes at a speed.

    Arguments:
        work: what is to be done.
        speed: of one process.
        processes: how many there are; they share the samples, and a step takes them as long as one of them with its
            share of the batch.
    """
    each = speed.training
    training = each.start + work.steps * each.step + work.checkpoints * each.checkpoint if work.steps else 0.0
    sampling = sum(count * speed.sampling[name] for name, count in work.samples.items())
    return Cost(training, (sampling + work.measured * speed.extraction) / processes, processes)
