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
# # An ablation, from the sweep to the verdict
#
# Does v-prediction beat ε on handwritten digits, on which schedule, at an equal number of steps, and how sure can one
# be? Every combination of two schedules, two parameterizations and three seeds, on a tiny network.

# %%
import os
import tempfile

from IPython.display import Image, Markdown, display
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt

from diffx.cli.main import run as diffx
from diffx.compare import compare, to_markdown
from diffx.experiment import read_runs

STEPS = int(os.environ.get("DIFFX_NOTEBOOK_STEPS", "150"))
TRY_OUT = STEPS < 100
SEEDS = "0,1" if TRY_OUT else "0,1,2"
RUNS = tempfile.mkdtemp()

# %% [markdown]
# ## The plan
#
# Before anything is trained: which arms there are, and whether their objectives are really different.

# %%
axes = ["schedule=linear,cosine", "parameterization=eps,v", f"seed={SEEDS}"]
settings = [
    "backbone=unet_tiny",
    f"training.max_steps={STEPS}",
    "lr_schedule.warmup_steps=0",
    "evaluation.every_n_steps=0",
    f"evaluation.num_samples={66 if TRY_OUT else 1000}",
    "evaluation.per_class=1",
    "metrics=[fd]",
    f"sampler.steps={2 if TRY_OUT else 10}",
    f"log_every_n_steps={max(1, STEPS // 30)}",
    "progress_bar=false",
    "trainer=cpu",
    f"runs_dir={RUNS}",
]
code = diffx(["plan", "probe=false", f"out={RUNS}/plan.png", *axes, *settings])
assert code == 0
display(Image(f"{RUNS}/plan.png"))

# %% [markdown]
# ## The sweep
#
# All arms of the first seed come first, so that they can be compared while the others run. Interrupted and typed again,
# the command trains only what is missing. (`hydra/launcher=joblib` runs several arms at once, `hydra/launcher=slurm`
# submits them.)

# %%
with capture_output():  # what is printed for each run
    code = diffx(["train", "-m", *axes, *settings])
assert code == 0

# %%
runs = read_runs(RUNS)
assert set(runs.runs["state"]) == {"finished"}
runs.runs.reset_index()[["schedule", "parameterization", "seed", "state", "step", "loss", "images_per_second"]]

# %% [markdown]
# ## How they learned
#
# The losses of different parameterizations with `weighting=unit` are errors of different things and cannot be compared;
# that each falls can be seen.

# %%
for (schedule, parameterization), rows in runs.history.groupby(["schedule", "parameterization"]):
    mean = rows.groupby("step")["loss"].mean()
    plt.plot(mean.index, mean, label=f"{schedule}, {parameterization}")
plt.gca().set(xlabel="step", ylabel="loss, mean over seeds", yscale="log")
plt.legend()

# %% [markdown]
# ## The verdict
#
# Arms are compared over the same seeds. An interval is that of the mean over seeds; a difference counts as one where
# its p-value, corrected for the number of differences looked at, is below 0.05.

# %%
verdict = compare(runs, metric="fd_digits", baseline={"schedule": "linear", "parameterization": "eps"})
display(Markdown(to_markdown(verdict)))

# %% [markdown]
# The same, as numbers:

# %%
for row in verdict.rows:
    print(f"{row.name}: {[round(value.value, 1) for value in row.values.values()]} {row.verdict}")
assert len(verdict.rows) == 4
assert sum(row.is_baseline for row in verdict.rows) == 1
assert all(len(row.values) == len(SEEDS.split(",")) for row in verdict.rows)

# %%
figure, axis = plt.subplots(figsize=(6, 2.5))
for k, row in enumerate(verdict.rows):
    axis.plot([value.value for value in row.values.values()], [k] * len(row.values), "o", alpha=0.6)
    axis.plot(row.mean.value, k, "|", markersize=18, color="black")
axis.set_yticks(range(len(verdict.rows)), [row.name for row in verdict.rows])
axis.set(xlabel="fd_digits of each seed, and the mean")
figure.tight_layout()
