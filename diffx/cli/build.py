"""From a resolved config to built objects."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from diffx.augmentations import Augmentation
from diffx.autoencoders import Autoencoder, Variational
from diffx.cli.switches import check_switches
from diffx.cli.types import locate_target
from diffx.conditioning import Conditioner
from diffx.data import DataSource
from diffx.data.stream import GlobalBatches
from diffx.denoisers import Denoiser, LearnedVariance, Preconditioned, Rescheduled
from diffx.evaluation import Evaluator
from diffx.experiment import fingerprint
from diffx.generate import Generator
from diffx.objectives import ELBO
from diffx.samplers import DDPMLearned
from diffx.training import EMA, DiffusionModule
from diffx.training.callbacks import Point
from diffx.utils import DiffxError, nearest

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
    _check_encoded(source, autoencoder)
    conditioner: Conditioner = make(config, "conditioning")
    denoiser = build_denoiser(config)
    # the variational bound has its own weights and times
    taken = inspect.signature(locate_target(config["objective"]["_target_"], "objective")).parameters
    objective = make(config, "objective", **{key: make(config, key) for key in _OF_OBJECTIVE if key in taken})
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
        augmentation=_augmentation(config, denoiser),
    )
    return Arm(
        config, source, module, build_evaluator(config, source), generators(config, autoencoder, conditioner, source)
    )


def _check_encoded(source: DataSource, autoencoder: Autoencoder) -> None:
    """Refuses latents of another autoencoder: what it cannot decode would still look like training."""
    encoded_by = getattr(source, "encoded_by", "")
    if encoded_by and encoded_by != autoencoder.fingerprint():
        raise DiffxError(
            f"the latents of data={source.name} were encoded by another autoencoder ({encoded_by[:12]}, and this is "
            f"{autoencoder.fingerprint()[:12]}); choose the autoencoder and weights they were encoded by, or encode "
            "them anew: diffx data encode"
        )


_OF_OBJECTIVE = ("time_sampler", "weighting")


def build_denoiser(config: Config) -> Preconditioned:
    """The model, on the schedule that it is trained on."""
    trained = "trained_schedule" if "trained_schedule" in config else "schedule"
    parts = {"schedule": make(config, trained), "parameterization": make(config, "parameterization")}
    return make(config, "denoiser", backbone=_backbone(config), **parts)


def _backbone(config: Config) -> Any:
    """The network, with as many output channels as the denoiser reads."""
    outputs = getattr(locate_target(config["denoiser"]["_target_"], "denoiser"), "outputs", 1)
    if outputs == 1 or config["backbone"].get("out_channels") is not None:
        return make(config, "backbone")
    return make(config, "backbone", out_channels=outputs * config["backbone"]["in_channels"])


def _augmentation(config: Config, denoiser: Preconditioned) -> Augmentation | None:
    """What is done to training samples; none in configs that do not name any."""
    if not config.get("augmentation"):
        return None
    augmentation: Augmentation = make(config, "augmentation")
    known = getattr(denoiser.backbone, "augment_labels", 0)
    if augmentation.labels and known != augmentation.labels:
        raise DiffxError(
            f"the augmentation has {augmentation.labels} labels and the network is told {known}, so that it would make "
            f"augmented samples; set augmentation=none, or backbone.augment_labels={augmentation.labels} on a backbone "
            "that has it, such as ddpmpp_cifar10"
        )
    return augmentation


def build_evaluator(config: Config, source: DataSource) -> Evaluator:
    """What measures samples against a source."""
    settings = config["evaluation"]
    metrics = {name: make(config["metrics"], name) for name in config["metrics"]}
    extractor = make(config, "extractor")
    return Evaluator(extractor, source, metrics, *(settings[k] for k in ("reference", "batch_size", "save_every")))


def asked(arm: Arm, config: Config, known: dict[str, Evaluator]) -> Arm:
    """The same trained model with other inference settings.

    Arguments:
        arm: the model, built.
        config: its config with the settings to sample and evaluate with.
        known: evaluators by what they were built from; a new one is added.
    """
    parts = {key: config[key] for key in ("extractor", "metrics", "data")}
    settings = {key: config["evaluation"][key] for key in ("reference", "batch_size", "save_every")}
    key = fingerprint(parts | settings)
    if key not in known:
        known[key] = build_evaluator(config, arm.source)
    generator = generators(config, arm.module.autoencoder, arm.module.conditioner, arm.source)
    return replace(arm, config=config, evaluator=known[key], generator=generator)


def points(arm: Arm) -> list[Point]:
    """How the model is sampled while it trains: as its config says, and as `evaluation.interim` does."""
    # the best weights are known only afterwards
    weights = arm.config["weights"]
    found = [Point("", "ema" if weights == "best" else weights, arm.generator)]
    for name, settings in arm.config["evaluation"].get("interim_points", {}).items():
        other = asked(arm, arm.config | settings, {})
        found.append(Point(name, settings["weights"], other.generator))
    return found


def final_points(arm: Arm, known: dict[str, Evaluator]) -> dict[str, Arm]:
    """The arm with each of the further settings of `evaluation.final`, by what was typed for it.

    Arguments:
        arm: the model, built.
        known: as in `asked`.
    """
    found = arm.config["evaluation"].get("final_points", {})
    return {name: asked(arm, arm.config | settings, known) for name, settings in found.items()}


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
            config["evaluation"].get("precision", "32-true"),  # a config of an older run has no choice
            static_shapes=bool(config["trainer"]["compile"]),
        )

    return generator


def rescheduled(config: Config) -> bool:
    """Whether a trained model is to be sampled on another schedule than its own."""
    return "trained_schedule" in config and config["trained_schedule"] != config["schedule"]


def check(arm: Arm, here: bool = True) -> None:
    """Finds what would fail later, before a GPU is taken.

    Arguments:
        arm: the arm.
        here: whether it is to run on this machine, so that its devices are looked for.

    Raises:
        DiffxError: for missing or corrupt data, missing weights, a batch that cannot be shared evenly, an
            undefined combination.
    """
    config, trainer = arm.config, arm.config["trainer"]
    check_schedule(arm)
    GlobalBatches(
        arm.source.batch_size,
        world_size=trainer["devices"] * trainer["num_nodes"],
        accumulate=trainer["accumulate_grad_batches"],
    )
    if here and trainer["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise DiffxError("there is no GPU here, or torch does not see it; set trainer=cpu, or check nvidia-smi")
    if here and trainer["accelerator"] == "gpu" and trainer["devices"] > torch.cuda.device_count():
        raise DiffxError(
            f"trainer.devices={trainer['devices']}, but this machine has {torch.cuda.device_count()}; ask for fewer"
        )
    if here:
        check_switches(config)
    arm.source.prepare()
    arm.source.check()
    # what fits into memory is decoded now, so that a corrupt file is found before anything is written
    arm.source.split("train")
    _check_latents(arm)
    settings = config["evaluation"]
    if settings["num_samples"] or (settings["every_n_steps"] and settings["interim_samples"]):
        split = arm.evaluator.split if arm.evaluator.extractor.dim else None
        if split is not None and not len(arm.source.split(split)):
            arm.source.split(split).fingerprint()  # says what is missing
        arm.evaluator.check(config["evaluation"]["num_samples"])
    averages = arm.module.ema.named()
    if config["weights"] == "best" and config["checkpoint"]["monitor"] is None:
        raise DiffxError("weights=best needs a metric that decides: set checkpoint.monitor=METRIC, such as fd_digits")
    if config["checkpoint"]["monitor"] and not (
        config["evaluation"]["every_n_steps"] and config["evaluation"]["interim_samples"]
    ):
        raise DiffxError(
            "checkpoint.monitor needs metrics in training: set evaluation.every_n_steps and evaluation.interim_samples"
        )
    final = final_points(arm, {})
    for other in final.values():
        other.evaluator.check(other.config["evaluation"]["num_samples"])
    at_the_end = [Point(name, other.config["weights"], other.generator) for name, other in final.items()]
    for point in (*points(arm), *(p for p in at_the_end if p.weights != "best")):
        if point.weights not in averages:
            raise DiffxError(
                f"there are no weights '{point.weights}' in training{nearest(point.weights, averages)}; "
                f"choose weights={' or '.join(averages)}"
            )
        generator = point.generator(arm.module.denoiser)
        generator.times()
        if isinstance(generator.sampler, DDPMLearned) and not isinstance(arm.module.denoiser, LearnedVariance):
            raise DiffxError(
                "sampler=ddpm_learned needs a model that has learned the variance; set denoiser=learned_variance "
                "objective=hybrid, or take sampler=ddpm"
            )


def _check_latents(arm: Arm) -> None:
    """Refuses a backbone that is not of the shape of the latents, and bounds for what has none."""
    channels, size, _ = arm.module.autoencoder.latent_shape(arm.source.channels, arm.source.image_size)
    for key, wanted in (("in_channels", channels), ("image_size", size)):
        found = arm.config["backbone"].get(key, wanted)
        if found != wanted:
            raise DiffxError(
                f"backbone.{key} is {found}, and latents have {channels}x{size}x{size} numbers; set "
                f"backbone.in_channels={channels} backbone.image_size={size}"
            )
    bounds = {arm.config["thresholding"].get("low"), arm.config["thresholding"].get("bound")}
    if isinstance(arm.module.autoencoder, Variational) and bounds & {-1.0, 1.0}:
        raise DiffxError("thresholding would keep latents in [-1, 1], the range of pixels; set thresholding=none")


def check_schedule(arm: Arm) -> None:
    """Refuses to train a schedule on a loss whose gradient says nothing about schedules.

    The variational bound does not depend on a schedule's interior, so that its variance can be minimised instead; any
    other loss would fall by moving the schedule to where the loss is small.

    Raises:
        DiffxError: naming the objective that does.
    """
    trained = any(parameter.requires_grad for parameter in arm.module.denoiser.schedule.parameters())
    if trained and not isinstance(arm.module.objective, ELBO):
        raise DiffxError(
            f"objective {type(arm.module.objective).__name__} would move a learned schedule to wherever that loss is "
            "small; set objective=elbo, or choose another schedule than learned"
        )


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
