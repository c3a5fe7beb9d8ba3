# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Train a diffusion model on handwritten digits, look at its samples, measure them, and sample it in other ways. A
# minute or two on a CPU.
#
# `diffx("train", …)` below is what `diffx train …` is on the command line.

# %%
import os
import tempfile

from IPython.display import Image, display
from matplotlib import pyplot as plt

from diffx.cli.main import run as diffx
from diffx.experiment import Run, find_runs, read_runs

STEPS = int(os.environ.get("DIFFX_NOTEBOOK_STEPS", "300"))
RUNS = tempfile.mkdtemp()
SAMPLES = f"evaluation.num_samples={360 if STEPS >= 100 else 80}"
FEW = "4,8,16" if STEPS >= 100 else "2,4"

# %% [markdown]
# A setting is `KEY=VALUE`, a part is `GROUP=CHOICE`; what is not named has the default in `configs/`. The same command
# again would find this run by what it is, and go on where it stopped.

# %%
settings = [
    f"training.max_steps={STEPS}",
    f"evaluation.every_n_steps={max(1, STEPS // 4)}",
    SAMPLES,
    f"evaluation.interim_samples={120 if STEPS >= 100 else 66}",
    f"log_every_n_steps={max(1, STEPS // 50)}",
    "progress_bar=false",
    f"runs_dir={RUNS}",
]
if STEPS < 100:
    settings += ["backbone=unet_tiny"]
code = diffx(["train", "schedule=cosine", "parameterization=v", *settings])
assert code == 0

# %% [markdown]
# Everything a run wrote and is lies in one directory.

# %%
(run,) = find_runs(RUNS)
assert run.state == "finished"
print(*sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()), sep="\n")

# %% [markdown]
# Ten samples of each class:

# %%
display(Image(run.samples / "final.png"))

# %% [markdown]
# The training log and the evaluations of all runs below a folder are tables of pandas.

# %%
runs = read_runs(RUNS)
history = runs.history
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot("step", "loss", data=history.dropna(subset="loss"))
left.set(xlabel="step", ylabel="loss", yscale="log")
right.plot("step", "eval/fd_digits", "o-", data=history.dropna(subset="eval/fd_digits"))
right.set(xlabel="step", ylabel="Fréchet distance of 120 samples", yscale="log")
figure.tight_layout()

# %% [markdown]
# Sampler, steps and guidance are questions asked of a trained model: nothing is trained again. Each value is stored
# with its protocol and its standard error.

# %%
code = diffx(
    ["evaluate", "-m", f"run={run.path}", "sampler=ddim,dpmpp_2m", f"sampler.steps={FEW}", "metrics=[fd]", SAMPLES]
)
assert code == 0

# %%
evaluations = read_runs(RUNS).evaluations
shown = evaluations[["sampler", "nfe", "fd_digits", "fd_digits_stderr", "num_samples"]]
shown.sort_values(["sampler", "nfe"]).reset_index(drop=True)

# %%
for sampler, rows in evaluations.sort_values("nfe").groupby("sampler"):
    plt.errorbar(rows["nfe"], rows["fd_digits"], rows["fd_digits_stderr"], marker="o", capsize=3, label=sampler)
plt.gca().set(xlabel="denoiser calls per sample", ylabel="Fréchet distance", xscale="log", yscale="log")
plt.legend()
assert len(evaluations) > 2 * FEW.count(",") + 2

# %% [markdown]
# The frozen config says what the run is, down to the last default.

# %%
config = Run(run.path).config()
{key: config[key] for key in ("schedule", "parameterization", "weighting", "objective", "sampler")}
