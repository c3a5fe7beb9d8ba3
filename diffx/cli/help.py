"""Help that teaches, without importing anything heavy."""

from diffx.cli.paths import groups

COMMANDS = {
    "train": "train a model, resume it, or say that it is finished; then evaluate it",
    "plan": "show what a sweep would train and cost: effective weights, equal arms, hours, arms that cannot work",
    "doctor": "look whether this machine, and a compute node, have what a run needs",
    "drill": "kill a run again and again, and see whether it comes to the same as one left alone",
    "jobs": "show what has become of every arm, its job and its log; resubmit or cancel",
    "parts": "describe every schedule, weighting, sampler, … with formula, source and defaults",
    "sample": "sample a trained run with any sampler, steps, guidance, labels and seed",
    "evaluate": "measure trained runs, or images: FID, IS, KID and their kin, with uncertainty and protocol",
    "compare": "put trained arms into a table: means over seeds, paired differences, verdicts, costs",
    "report": "write one page that answers the question of a sweep: table, plots, samples, provenance",
    "reference": "compute the statistics that samples are compared with, for nodes without the data or the network",
    "data": "pack images into shards, look at them, encode them into latents",
    "wandb": "upload to Weights & Biases what was written offline; a workspace there for a sweep",
    "learn-times": "find the times at which few steps of a sampler come nearest to the exact solution",
    "fit-classifier": "train the classifier of noisy images that guidance=classifier climbs",
    "fit-autoencoder": "train a small KL autoencoder for latent diffusion",
    "fit-extractor": "fit the small classifier that metrics on a labelled data set stand on",
}

TRAIN = """\
diffx train: train one arm, or with -m every arm of a sweep.

usage: diffx train [KEY=VALUE …] [GROUP=CHOICE …]
       diffx train -m GROUP=CHOICE,CHOICE …          every combination, all of the first seed first
       diffx train -m hydra/launcher=joblib …        several at once: one on each GPU, without GPUs one on each core
       diffx train -m hydra/sweeper=optuna …         search: every trial a run, poor ones are stopped early
       diffx train --cfg [KEY=VALUE …]               print the composed config and stop
       diffx train --config-dir DIR …                find your own YAML files beside the shipped ones

The same command again resumes an interrupted run and recognises a finished one. A run's directory is
runs/<name>/<what was overridden>-<hash of what the experiment is>/seed<k>/. Sampler, guidance and metrics are no part
of that hash: asked for others, a finished run is evaluated anew and not trained again; axes of them in a sweep evaluate
each model at every point. Arms end at equal training.max_steps, max_images or max_flops, or after max_device_seconds.

examples:
  diffx train                                                  the demo: digits, minutes on a CPU
  diffx train schedule=cosine parameterization=v seed=1
  diffx train -m schedule=linear,cosine parameterization=eps,x0,v seed=0,1,2
  diffx train -m schedule=linear,cosine sampler=ddim,dpmpp_2m sampler.steps=5,10     two models, sampled in four ways
  diffx train -m backbone=unet_tiny,dit_tiny training.max_flops=1e12 seed=0,1,2      two networks at equal compute
  diffx train -m hydra/launcher=joblib hydra.launcher.n_jobs=2 schedule=linear,cosine seed=0,1
  diffx train -m hydra/sweeper=optuna 'optimizer.lr=tag(log,interval(1e-4,1e-2))' schedule=linear,cosine
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
  out=null           a .png (one grid), a .npz (arr_0, as ADM's evaluation reads it), a .tar (a WebDataset shard) or a
                     folder (one PNG each); by default a grid in the run directory
  weights=ema        ema, ema_<decay> of a further ema.decay, best of checkpoint.monitor
  trajectory=false   instead of samples, how ten of them come out of the noise: x_t above, the estimate below
  batch_size=256     samples per batch
  device=auto        auto, cpu, cuda
Sampler, discretization, guidance, thresholding and schedule are those of the run unless you say otherwise; on another
schedule the model is sampled at equal logSNR.

examples:
  diffx sample run=runs/digits/default-1a2b3c4d5e/seed0
  diffx sample run=DIR sampler=dpmpp_2m sampler.steps=10 discretization=logsnr out=grid.png
  diffx sample run=DIR guidance=cfg guidance.scale=2 labels=[3] n=16
  diffx sample run=DIR trajectory=true labels=[3]
  diffx sample run=DIR n=50000 out=samples.npz
"""

EVALUATE = """\
diffx evaluate: measure trained runs. Each value is stored with its protocol and its uncertainty in the run directory;
what has been measured already is not measured again, and what was interrupted goes on where it stopped.

usage: diffx evaluate run=DIR [KEY=VALUE …] [GROUP=CHOICE …]
       diffx evaluate -m run=DIR,DIR sampler=A,B …      every point, in one process; then a table and plots over NFE
       diffx evaluate images=PATH data=CHOICE …         images of any program: a folder, or an .npz with arr_0
       diffx evaluate repeat=FILE                       a record again, from its own settings, digit by digit

  run=DIR                        a run directory, several, or a pattern such as 'runs/digits/*/seed*'
  metrics=[fd,is,consistency]    what to measure (below)
  weights=ema                    ema, ema_<decay> of a further ema.decay, best of checkpoint.monitor
  evaluation.num_samples=1437    number of samples
  evaluation.reference=train     the split to compare with, or an .npz file with mu and sigma
  evaluation.seed=0              seed of the samples
  device=auto  devices=1         auto, cpu, cuda; how many processes (values do not depend on it)

examples:
  diffx evaluate run=DIR
  diffx evaluate -m run=DIR sampler=ddim,dpmpp_2m sampler.steps=5,10,20
  diffx evaluate run=DIR metrics=[fd,kid,pr,dc,per_class_fd,nearest]
  diffx evaluate run=DIR extractor=inception extractor.weights=weights-inception-2015-12-05-6726825d.pth
"""

DOCTOR = """\
diffx doctor: look whether this machine has what a run needs: versions, devices, processes that find each other (gloo,
or NCCL over all GPUs), SLURM's partitions, speed and locks of the file system, internet, W&B, and the arm itself: its
code, data, weights and reference statistics. With launcher=slurm a compute node is asked the same, and compared.

usage: diffx doctor [KEY=VALUE …] [GROUP=CHOICE …]

Exit code 0 if a run would work, 1 if something is to be mended.

examples:
  diffx doctor
  diffx doctor experiment=ddpm_cifar10 trainer=gpu logger=wandb
  diffx doctor launcher=slurm launcher.partition=gpu experiment=ddpm_cifar10
"""

DRILL = """\
diffx drill: train an arm twice, once left alone, once killed again and again by INT, TERM, USR1, USR2 and KILL at
random moments of start-up, training, checkpointing and evaluation; then compare, bit for bit, weights, EMA, optimizer,
metrics and evaluations. Exit code 0 if they are the same, 1 if not.

usage: diffx drill [KEY=VALUE …] [GROUP=CHOICE …] [kills=20] [draw=0] [out=FOLDER]

  kills=20     how often to kill
  draw=0       seed of the moments
  out=FOLDER   keep both runs there

On a CPU results are exact; a GPU's sums may differ in their last digits from one run to the next by themselves.

examples:
  diffx drill training.max_steps=400 checkpoint.every_n_steps=50 evaluation.every_n_steps=100
  diffx drill trainer.devices=2 kills=5 training.max_steps=400 checkpoint.every_n_steps=50
"""

JOBS = """\
diffx jobs: what has become of every arm, by its own word, its ledger (jobs.jsonl) and SLURM's, where there is one.

usage: diffx jobs [FOLDER …]                     runs below these folders; by default runs
       diffx jobs [FOLDER …] --log               and the last lines of each log
       diffx jobs [FOLDER …] --watch             until all have ended
       diffx jobs [FOLDER …] --resubmit [launcher.KEY=VALUE …]   what failed, was killed, cancelled or never started
       diffx jobs [FOLDER …] --cancel            what is queued or running

examples:
  diffx jobs runs/digits
  diffx jobs runs/digits --resubmit launcher.mem=64G launcher.time=8:00:00
"""

PARTS = """\
diffx parts: every part with its formula, source, defaults and when to use it.

usage: diffx parts [GROUP …] [out=FILE.md] [plots=DIR]

examples:
  diffx parts sampler
  diffx parts schedule weighting plots=plots       logSNR over time, weights and densities over logSNR, as PNG
  diffx parts out=docs/parts.md                    the whole page
"""

PLAN = """\
diffx plan: what a sweep would train and what it would cost, before anything is trained.

usage: diffx plan [KEY=VALUE …] [GROUP=CHOICE,CHOICE …] [probe=10] [out=plan.png] [switches=true]

For each arm: its parameters, its range of logSNR, and the effective weight of its loss over logSNR, as a table and a
plot. It says which arms are the same objective written differently, which differ by a constant, and which cannot work.

Then it trains, samples and measures a little on this machine, in a temporary folder, and tells images per second, peak
memory, FLOPs per image, and the hours of every run that is not finished, evaluations included. Arms of one network,
batch, data and precision are tried out once.

  probe=10           seconds for which training steps are timed; probe=false leaves costs out
  out=plan.png       the plot: .png, .pdf or .svg
  switches=true      trains a little with each switch of trainer that is off, and tells what it gains and costs

examples:
  diffx plan experiment=ddpm_cifar10 trainer=gpu probe=5 switches=true
  diffx plan schedule=linear,cosine parameterization=eps,v seed=0,1,2
  diffx plan parameterization=eps,x0 weighting=unit,snr probe=false
"""

REFERENCE = """\
diffx reference: compute mean and covariance of a split's features once, and put them into the cache.

usage: diffx reference data=CHOICE extractor=CHOICE [evaluation.reference=train] [out=FILE.npz] [device=auto]

The file has mu and sigma, as published ones do, and is what a node without the data or the internet needs:
evaluation.reference=FILE.npz.

examples:
  diffx reference data=digits extractor=digits out=digits.npz
  diffx reference data=cifar10 data.root=FOLDER extractor=inception out=cifar10.npz
"""

FIT_EXTRACTOR = """\
diffx fit-extractor: fit the small classifier that fd_<name>, is_<name> and class_consistency stand on.

usage: diffx fit-extractor data=CHOICE [data.KEY=VALUE …] [out=FILE] [min_accuracy=0.97] [epochs=null] [seed=0]

It is trained on the training split (4 to 60 passes, by its size, unless epochs says otherwise), tested on the held-out
one, and not saved below min_accuracy.

examples:
  diffx fit-extractor data=fashion_mnist min_accuracy=0.9 epochs=5 out=fashion_mnist.safetensors
  diffx train data=fashion_mnist backbone=unet_28 extractor=classifier extractor.weights=fashion_mnist.safetensors
"""

FIT_CLASSIFIER = """\
diffx fit-classifier: train a classifier of noisy images, for guidance=classifier on any schedule.

usage: diffx fit-classifier data=CHOICE [schedule=CHOICE] [out=FILE.safetensors] [training.max_steps=2000]
       [classifier.width=32] [optimizer.lr=2e-3] [data.batch_size=N] [seed=0] [device=auto]

For latent diffusion give the autoencoder of the model: the classifier sees the latents that the denoiser sees.
Held-out accuracy by logSNR is printed and kept in the file.

examples:
  diffx fit-classifier data=digits out=noisy.safetensors
  diffx sample run=DIR guidance=classifier guidance.classifier.weights=noisy.safetensors guidance.scale=2
"""

LEARN_TIMES = """\
diffx learn-times: find the times at which K steps of a sampler come nearest to the exact solution.

usage: diffx learn-times run=DIR sampler=CHOICE sampler.steps=K [n=256] [iterations=20] [out=FILE.json] [device=auto]

Takes a deterministic sampler. The times are kept as logSNR, so that any schedule can use them, and compared with
uniform, Karras and logSNR spacing: by the distance to the exact solution on samples that the search has not seen, and
by the Fréchet distance of evaluation.num_samples samples on each (0: not measured).

examples:
  diffx learn-times run=DIR sampler=dpmpp_2m sampler.steps=6
  diffx evaluate run=DIR sampler=dpmpp_2m sampler.steps=6 discretization=learned discretization.path=FILE
"""

FIT_AUTOENCODER = """\
diffx fit-autoencoder: train diffx's own small KL autoencoder, minutes on a CPU for images of 32 pixels.

usage: diffx fit-autoencoder data=CHOICE [out=FILE.safetensors] [KEY=VALUE …]

  training.max_steps=1000         optimizer steps of data.batch_size images
  training.loss=l1                l1 or mse, of the reconstruction
  training.kl_weight=1e-6         of the KL divergence to N(0, I)
  autoencoder.mult=[1,2]          the width of each level over autoencoder.base; each but the last halves the size
  autoencoder.base=16  autoencoder.blocks=1  autoencoder.latent_channels=4
  optimizer.lr=2e-3  seed=0  device=auto

Without the adversarial and perceptual losses of a full first stage: fine details stay blurred. The error on held-out
images is printed as PSNR, and kept in the file with the scale of the latents.

examples:
  diffx fit-autoencoder data=cifar10 out=kl.safetensors
  diffx data encode SHARDS LATENTS autoencoder=kl autoencoder.weights=kl.safetensors
"""

DATA = """\
diffx data: images into tar shards, a look at them, and latents of them.

usage: diffx data pack SOURCE DEST [KEY=VALUE …]      any images into shards of WebDataset's layout
       diffx data inspect PATH [KEY=VALUE …]          what shards hold: statistics, classes, broken samples, a picture
       diffx data encode SOURCE DEST autoencoder=…    shards into shards of latents, to train on with data=latents

diffx data COMMAND --help tells more.

examples:
  diffx data pack photos shards image_size=64
  diffx data inspect shards out=grid.png
  diffx data encode shards latents autoencoder=kl autoencoder.weights=kl.safetensors
"""

DATA_PACK = """\
diffx data pack: put images into tar shards, once, for fast reading from any disk.

usage: diffx data pack SOURCE DEST [KEY=VALUE …]
       diffx data pack DEST data=CHOICE [data.KEY=VALUE …]      a data set that diffx knows

SOURCE is a folder of images (its subfolders are classes; train and test or val are splits; name.txt and name.json go
with name.jpg), a folder of idx files, an .npz (images and labels, arr_0 and arr_1, x_train and y_train …), parquet
files as Hugging Face writes them, or shards. DEST gets the shards and manifest.json; splits get a folder each in DEST.
The same command again goes on where it was interrupted; the shards are the same bytes for any number of workers.

  shard_size=10000        samples in a shard, or bytes, such as 256MB
  image_size=null         scale the shorter side to so many pixels and crop the centre; null leaves the size
  filter=adm              adm (boxes, then bicubic), bicubic, lanczos, bilinear, box: all antialiased
  format=null             jpg, png, webp (lossless) or npy; null keeps files that nothing changes about, else png
  quality=95              of jpg
  channels=null           1 for grey, 3 for RGB; null leaves the colours
  upscale=false           enlarge smaller images, instead of refusing them
  shuffle=true seed=0     a random order, so that no shard holds one class only
  keys=names              from the files' names, or numbers
  classes=true            keep classes
  broken=stop             at an image that cannot be read, or skip it and note it in the manifest
  num_classes=null        refuse labels of this number or more; null takes what there is
  image_key, label_key, text_key    the arrays or columns, where their names are not the usual ones
  workers=null            processes; null takes every core

examples:
  diffx data pack ~/photos shards image_size=64
  diffx data pack imagenet shards image_size=256 format=jpg shard_size=1GB
  diffx data pack cifar10.npz shards
  diffx data pack shards data=fashion_mnist data.root=FOLDER
  diffx data pack old_shards new_shards image_size=128 keys=numbers
"""

DATA_INSPECT = """\
diffx data inspect: what shards, or anything that can be packed, hold; every sample is read.

usage: diffx data inspect PATH [KEY=VALUE …]

Prints the number of samples, mean and standard deviation of each channel, sizes and colour modes, the balance of the
classes, and every sample that cannot be read, by shard and key; then the exit code is 1.

  out=null           a PNG of samples, a row for each class
  n=100              images in it
  checksums=false    compare the shards with the sha256 in their manifest
  classes=true       read classes
  workers=null       processes; null takes every core

examples:
  diffx data inspect shards out=grid.png
  diffx data inspect shards checksums=true
"""

DATA_ENCODE = """\
diffx data encode: encode images once, and train on their latents.

usage: diffx data encode SOURCE DEST autoencoder=CHOICE autoencoder.weights=FILE [KEY=VALUE …]
       diffx data encode DEST data=CHOICE autoencoder=… …      a data set that diffx knows

SOURCE is anything that diffx data pack takes. DEST gets a shard for each shard of SOURCE (or for each shard_size
samples): key.npy has mean and log-variance of the latent, so that training draws from it anew each time. The manifest
has the latents' mean and standard deviation and the fingerprint of the autoencoder; no other one can be trained with.
The same command again goes on where it was interrupted.

  dtype=float16           or float32
  flip=false              store the latent of the mirrored image too; training chooses with data.flip=true
  batch_size=64           images at a time
  image_size=null         scale and crop first, as diffx data pack does; null takes images as they are
  filter=adm  channels=3  upscale=false  shard_size=10000  classes=true
  device=auto  devices=1  auto, cpu, cuda; how many processes on this machine
  rank, world_size        this process, and how many there are, on several machines; under srun they are known

examples:
  diffx data encode shards latents autoencoder=kl autoencoder.weights=kl.safetensors
  diffx data encode shards latents autoencoder=diffusers autoencoder.weights=stabilityai/sd-vae-ft-ema devices=8
  diffx train data=latents data.shards=latents data.channels=4 data.image_size=16 data.decoded_size=32 \\
              data.num_classes=10 thresholding=none autoencoder=kl autoencoder.weights=kl.safetensors data.images=shards
"""

WANDB = """\
diffx wandb: what runs have written offline into Weights & Biases, and a view of a sweep there.

usage: diffx wandb sync [FOLDER …] [--all]            upload by wandb's own command; by default below runs
       diffx wandb workspace [FOLDER …] [out=workspace.json] [project=NAME] [entity=TEAM]

sync finds the offline folders of runs and resumed runs that have not been uploaded, and lists them where there is no
key (wandb login). --all takes runs that were online too, whose end W&B may not have taken.

workspace writes the definition of a W&B workspace for these runs: results by what differs between them, metrics over
steps and compute, the loss by noise level, samples, speed; seeds are grouped. Where W&B can be reached it is saved
there too. It needs pip install 'diffx[workspaces]'.

examples:
  diffx train -m schedule=linear,cosine seed=0,1,2 logger=wandb
  diffx wandb sync runs/digits
  diffx wandb workspace runs/digits out=workspace.json
"""

COMPARE = """\
diffx compare: many runs as one table, with intervals and verdicts.

usage: diffx compare FOLDER … [--metric NAME] [--by KEY,KEY] [--baseline ARM] [--pivot] [KEY=VALUE,VALUE …]

  FOLDER …           folders of runs, or run directories; by default runs
  --metric NAME      what is compared, as fd_digits; several with commas; by default the first of fid and fd_*
  --by KEYS          what tells rows apart, of arms (schedule, optimizer.lr) and of sampling (sampler, sampler.steps);
                     by default all that differs. Where it names arms only, each run's own way of sampling counts
  --baseline ARM     what the others are compared with, as schedule=cosine; keys left out are each row's own, so that
                     linear is compared with cosine at the same parameterization. By default the first row's arm
  --pivot            two axes: the first downwards, the second across
  --best-seed        the best seed of each row too, labelled so
  --allow-mismatch   show what was measured otherwise (extractor, reference, number of samples …), marked, no verdict
  --format FORMAT    terminal, markdown, latex (booktabs) or csv (all numbers, unrounded)
  --out FILE         a file; .md, .tex, .csv and .txt say the format
  KEY=VALUE          only these runs or evaluations, as schedule=cosine, seed=0,1, sampler.steps=20

Intervals are 95 %: Student's t over training seeds. Differences are of runs of the same seed, which share initial
weights, data and noise (paired t). With one seed both are over its samples (jackknife), and the table says so. Verdicts
are at the 5 % level after Holm's correction for all differences in the table. Unfinished, damaged, copied and diverged
runs are named below the table and left out; evaluations of earlier steps never count.

examples:
  diffx compare runs/ablation --metric fd_digits --by schedule,parameterization
  diffx compare runs/ablation --by schedule,parameterization --pivot --out table.tex
  diffx compare runs/ablation --baseline schedule=cosine,parameterization=v sampler.steps=20
  diffx compare runs/digits --by sampler,sampler.steps --metric fd_digits,is_digits
"""

REPORT = """\
diffx report: one HTML page that answers the question of a sweep. It opens from its file without a network.

usage: diffx report FOLDER … [--metric NAME] [--by AXIS,AXIS] [--baseline ARM] [--out FILE.html] [KEY=VALUE,VALUE …]

  FOLDER …          folders of runs, or run directories; by default runs
  --metric NAME     what arms are compared by; by default the first of fid and fd_*
  --by AXES         what tells rows apart; by default all that differs between arms, each sampled as its config says
  --baseline ARM    what the others are held against, as schedule=linear,parameterization=eps
  --out FILE        the page; report.html by default
  --figures FOLDER  where the plots go as PDF and SVG; <out>_figures by default
  --allow-mismatch  show values that were measured otherwise than most, marked and without a verdict
  --title TEXT      instead of the experiment's name
  --question TEXT   instead of the question that follows from the axes
  KEY=VALUE         only these runs or evaluations, as schedule=cosine, seed=0,1, sampler.steps=20

The page holds the verdicts and the table of the comparison, sample grids of every arm at the same noise, learning
curves over steps, images, FLOPs or device-hours, the loss by noise level, the metric against NFE and cost, main effects
and interactions of the axes, what was run on which machine with which code, and the command that repeats each number.
The same runs give the same bytes. What is missing or broken is said in the page; the rest is shown.

examples:
  diffx report runs/ablation
  diffx report runs/ablation --metric fd_digits --by schedule,parameterization --out report.html
  diffx evaluate -m run='runs/ablation/*/seed*' sampler.steps=5,10,20      then the page has plots over NFE
"""

_TEXTS = {
    "train": TRAIN,
    "plan": PLAN,
    "doctor": DOCTOR,
    "drill": DRILL,
    "jobs": JOBS,
    "parts": PARTS,
    "sample": SAMPLE,
    "evaluate": EVALUATE,
    "compare": COMPARE,
    "report": REPORT,
    "reference": REFERENCE,
    "fit-extractor": FIT_EXTRACTOR,
    "fit-classifier": FIT_CLASSIFIER,
    "learn-times": LEARN_TIMES,
    "fit-autoencoder": FIT_AUTOENCODER,
    "data": DATA,
    "data pack": DATA_PACK,
    "data inspect": DATA_INSPECT,
    "data encode": DATA_ENCODE,
    "wandb": WANDB,
}


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


def topic(name: str, arguments: list[str]) -> str:
    """What `diffx NAME ARGUMENTS` asks help for: the command, or a command below it."""
    return next((f"{name} {word}" for word in arguments[:1] if f"{name} {word}" in _TEXTS), name)


def command_help(name: str) -> str:
    """The text of `diffx NAME --help`, with the choices that the config folders hold now."""
    text = _TEXTS[name]
    shown = {
        "train": list(groups()),
        "plan": ["schedule", "parameterization", "weighting", "time_sampler", "objective", "backbone"],
        "doctor": ["experiment", "trainer", "launcher", "logger"],
        "drill": ["experiment", "data", "backbone", "trainer"],
        "jobs": ["launcher"],
        "parts": list(groups()),
        "sample": ["sampler", "discretization", "guidance", "thresholding", "schedule"],
        "evaluate": ["metrics", "extractor", "sampler", "discretization", "guidance", "thresholding", "schedule"],
        "compare": [],
        "report": [],
        "reference": ["data", "extractor"],
        "fit-extractor": ["data"],
        "learn-times": ["sampler", "guidance", "thresholding", "schedule"],
        "fit-classifier": ["data", "autoencoder", "schedule", "time_sampler", "optimizer", "lr_schedule"],
        "fit-autoencoder": ["data", "optimizer", "lr_schedule"],
        "data": ["data", "autoencoder"],
        "data pack": ["data"],
        "data inspect": [],
        "data encode": ["data", "autoencoder"],
        "wandb": ["logger"],
    }[name]
    if not shown:
        return text
    choices = groups()
    width = max(map(len, shown))
    lines = [f"  {group + '=':<{width + 1}} {' | '.join(choices[group])}" for group in shown if group in choices]
    return text + "\ngroups and their choices:\n" + "\n".join(lines)
