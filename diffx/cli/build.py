"""From a resolved config to built objects."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from diffx.autoencoders import Autoencoder
from diffx.conditioning import Conditioner
from diffx.data import DataSource
from diffx.data.stream import GlobalBatches
from diffx.denoisers import Denoiser, Preconditioned, Rescheduled
from diffx.evaluation import Evaluator
from diffx.generate import Generator
from diffx.training import EMA, DiffusionModule
from diffx.utils import DiffxError

Config = dict[str, Any]


@dataclass
class Arm:
    """An arm of an experiment, built.

    Arguments:
        config: the config it was built from.
        source: the data.
        module: what is trained; holds denoiser, autoencoder, conditioner and EMA.
        evaluator: measures its samples.
        generator: makes a generator of a denoiser.
    """

    config: Config
    source: DataSource
    module: DiffusionModule
    evaluator: Evaluator
    generator: Callable[[Denoiser], Generator]


def build(config: Config) -> Arm:
    """Builds an arm; the weights depend on the seed alone.

    Raises:
        DiffxError: if parts do not fit together.
    """
    # every part draws its own weights: swapping one leaves the others' initialisation as it was
    torch.manual_seed(config["seed"])
    source: DataSource = make(config, "data")
    autoencoder: Autoencoder = make(config, "autoencoder")
    conditioner: Conditioner = make(config, "conditioning")
    trained = "trained_schedule" if "trained_schedule" in config else "schedule"
    denoiser = Preconditioned(make(config, "backbone"), make(config, trained), make(config, "parameterization"))
    objective = make(
        config, "objective", time_sampler=make(config, "time_sampler"), weighting=make(config, "weighting")
    )
    ema: EMA = make(config, "ema")(denoiser)
    module = DiffusionModule(
        denoiser,
        objective,
        autoencoder,
        conditioner,
        ema,
        make(config, "optimizer"),
        make(config, "lr_schedule"),
        seed=config["seed"],
        batch_size=source.batch_size,
    )
    return Arm(
        config, source, module, build_evaluator(config, source), generators(config, autoencoder, conditioner, source)
    )


def build_evaluator(config: Config, source: DataSource) -> Evaluator:
    """What measures samples against a source."""
    settings = config["evaluation"]
    return Evaluator(
        make(config, "extractor"), source, settings["reference"], settings["batch_size"], settings["nearest"]
    )


def generators(
    config: Config, autoencoder: Autoencoder, conditioner: Conditioner, source: DataSource
) -> Callable[[Denoiser], Generator]:
    """What makes a generator of a denoiser, with the sampler, guidance and thresholding of a config."""
    node = dict(config["sampler"])
    steps = node.pop("steps")
    sampler = make({"sampler": node}, "sampler")
    discretization = make(config, "discretization")
    guidance, thresholding = make(config, "guidance"), make(config, "thresholding")
    null = conditioner.null(1)
    if not null and config["guidance"]["_target_"].endswith("ClassifierFree"):
        raise DiffxError("classifier-free guidance needs a conditional model; set guidance=none or conditioning=label")

    def generator(denoiser: Denoiser) -> Generator:
        if rescheduled(config):
            denoiser = Rescheduled(denoiser, make(config, "schedule"))
        return Generator(
            thresholding(guidance(denoiser, conditioner)),
            sampler,
            discretization,
            steps,
            autoencoder,
            conditioner,
            autoencoder.latent_shape(source.channels, source.image_size),
            config["evaluation"]["seed"],
            source.num_classes if null else 0,
        )

    return generator


def rescheduled(config: Config) -> bool:
    """Whether a trained model is to be sampled on another schedule than its own."""
    return "trained_schedule" in config and config["trained_schedule"] != config["schedule"]


def check(arm: Arm) -> None:
    """Finds what would fail later, before a GPU is taken.

    Raises:
        DiffxError: for missing or corrupt data, missing weights, a batch that cannot be shared evenly, an
            undefined combination.
    """
    config, trainer = arm.config, arm.config["trainer"]
    GlobalBatches(
        arm.source.batch_size,
        world_size=trainer["devices"] * trainer["num_nodes"],
        accumulate=trainer["accumulate_grad_batches"],
    )
    if trainer["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise DiffxError("there is no GPU here, or torch does not see it; set trainer=cpu, or check nvidia-smi")
    if trainer["accelerator"] == "gpu" and trainer["devices"] > torch.cuda.device_count():
        raise DiffxError(
            f"trainer.devices={trainer['devices']}, but this machine has {torch.cuda.device_count()}; ask for fewer"
        )
    arm.source.prepare()
    arm.source.check()
    # what fits into memory is decoded now, so that a corrupt file is found before anything is written
    arm.source.split("train")
    if config["evaluation"]["num_samples"] or config["evaluation"]["interim_samples"]:
        arm.evaluator.check()
    arm.generator(arm.module.denoiser).times()


def make(config: Config, group: str, **parts: Any) -> Any:
    """The object of one group.

    Raises:
        DiffxError: what the constructor says of its arguments.
    """
    try:
        return instantiate(config[group], **parts)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, DiffxError):
            raise cause from None
        said = str(cause or error).splitlines()[0]
        raise DiffxError(f"{group} cannot be built from its settings: {said}; correct {group}=… or its keys") from error
