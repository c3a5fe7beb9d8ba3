"""Help that teaches, without importing anything heavy."""

from diffx.cli.paths import groups

COMMANDS = {
    "train": "train a model, resume it, or say that it is finished; then evaluate it",
    "sample": "sample a trained run with any sampler, steps, guidance, labels and seed",
    "evaluate": "measure a trained run: FID, IS and their kin, with uncertainty and protocol",
    "fit-extractor": "fit the small classifier that metrics on a labelled data set stand on",
}

TRAIN = """\
diffx train: train one arm, or with -m every arm of a sweep.

usage: diffx train [KEY=VALUE …] [GROUP=CHOICE …]
       diffx train -m GROUP=CHOICE,CHOICE …          every combination, one after the other
       diffx train --cfg [KEY=VALUE …]               print the composed config and stop
       diffx train --config-dir DIR …                find your own YAML files beside the shipped ones

The same command again resumes an interrupted run and recognises a finished one. A run's directory is
runs/<name>/<what was overridden>-<hash of what the experiment is>/seed<k>/. Sampler, guidance and metrics are no part
of that hash: asked for others, a finished run is evaluated anew and not trained again.

examples:
  diffx train                                                  the demo: digits, minutes on a CPU
  diffx train schedule=cosine parameterization=v seed=1
  diffx train -m schedule=linear,cosine parameterization=eps,x0,v seed=0,1,2
  diffx train data=folder data.root=~/photos data.image_size=64 backbone=unet_28 extractor=none
  diffx train training.max_steps=200000 trainer=gpu trainer.devices=8 logger=wandb
  diffx train schedule._target_=mypkg.MySchedule               a class of your own
"""

SAMPLE = """\
diffx sample: make images from a trained run.

usage: diffx sample run=DIR [KEY=VALUE …] [GROUP=CHOICE …]      (-m sweeps)

  run=DIR            the run directory that diffx train named
  n=100              number of samples
  labels=null        classes, as [0,3,7]: taken in turn; null takes every class in turn
  seed=0             sample k of a seed is the same image at any batch size
  out=null           a .png (one grid), a .npz (arr_0, as ADM's evaluation reads it) or a folder (one PNG each);
                     by default a grid in the run directory
  batch_size=256     samples per batch
  device=auto        auto, cpu, cuda
Sampler, discretization, guidance, thresholding and schedule are those of the run unless you say otherwise; on another
schedule the model is sampled at equal logSNR.

examples:
  diffx sample run=runs/digits/default-1a2b3c4d5e/seed0
  diffx sample run=DIR sampler=dpmpp_2m sampler.steps=10 discretization=logsnr out=grid.png
  diffx sample run=DIR guidance=cfg guidance.scale=2 labels=[3] n=16
  diffx sample run=DIR n=50000 out=samples.npz
"""

EVALUATE = """\
diffx evaluate: measure a trained run. Each value is stored with its protocol in the run directory; what has been
measured already is not measured again.

usage: diffx evaluate run=DIR [KEY=VALUE …] [GROUP=CHOICE …]    (-m sweeps)

  run=DIR                        the run directory that diffx train named
  evaluation.num_samples=1437    number of samples
  evaluation.seed=0              seed of the samples
  device=auto                    auto, cpu, cuda

examples:
  diffx evaluate run=DIR
  diffx evaluate -m run=DIR sampler=ddim,dpmpp_2m sampler.steps=5,10,20
  diffx evaluate run=DIR extractor=inception extractor.weights=weights-inception-2015-12-05-6726825d.pth
"""

FIT_EXTRACTOR = """\
diffx fit-extractor: fit the small classifier that fd_<name>, is_<name> and class_consistency stand on.

usage: diffx fit-extractor data=CHOICE [data.KEY=VALUE …] [out=FILE] [min_accuracy=0.97] [epochs=60] [seed=0]

It is trained on the training split, tested on the held-out one, and not saved below min_accuracy.

examples:
  diffx fit-extractor data=fashion_mnist min_accuracy=0.9 epochs=5 out=fashion_mnist.safetensors
  diffx train data=fashion_mnist backbone=unet_28 extractor=classifier extractor.weights=fashion_mnist.safetensors
"""

_TEXTS = {"train": TRAIN, "sample": SAMPLE, "evaluate": EVALUATE, "fit-extractor": FIT_EXTRACTOR}


def overview() -> str:
    """The text of `diffx --help`."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "diffx: an experiment platform for diffusion models.\n\n"
        "usage: diffx COMMAND [KEY=VALUE …] [GROUP=CHOICE …]\n\n"
        f"commands:\n{lines}\n\n"
        "start here:\n"
        "  diffx train                    the demo: handwritten digits, minutes on a CPU\n"
        "  diffx train --help             every part and how to swap it\n"
    )


def command_help(name: str) -> str:
    """The text of `diffx NAME --help`, with the choices that the config folders hold now."""
    text = _TEXTS[name]
    shown = {
        "train": list(groups()),
        "sample": ["sampler", "discretization", "guidance", "thresholding", "schedule"],
        "evaluate": ["sampler", "discretization", "guidance", "thresholding", "schedule", "extractor"],
        "fit-extractor": ["data"],
    }[name]
    choices = groups()
    width = max(map(len, shown))
    lines = [f"  {group + '=':<{width + 1}} {' | '.join(choices[group])}" for group in shown if group in choices]
    return text + "\ngroups and their choices:\n" + "\n".join(lines)
