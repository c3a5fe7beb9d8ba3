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
# # Your own parts
#
# A part is one class and one YAML file. Here: a schedule, a backbone and a data set, written outside of diffx, held
# against what can be known of them, and then trained like any other.

# %%
import os
import tempfile
from pathlib import Path

import torch
from IPython.display import Image, display
from matplotlib import pyplot as plt
from torch import nn

from diffx.backbones.base import Backbone
from diffx.cli.main import run as diffx
from diffx.data.base import TensorImages
from diffx.data.map_source import Found, MapSource
from diffx.denoisers import GaussianMixture
from diffx.discretizations import LogSNR
from diffx.experiment import find_runs
from diffx.samplers import DPMSolverPP2M
from diffx.schedules import Schedule
from diffx.utils import Keys

STEPS = int(os.environ.get("DIFFX_NOTEBOOK_STEPS", "400"))
FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A schedule
#
# α and σ as functions of t; everything else (logSNR, its inverse, the derivatives that samplers need) follows.


# %%
class Trigonometric(Schedule):
    """α = cos(πt^p/2), σ = sin(πt^p/2)."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, t):
        angle = torch.pi / 2 * t**self.power
        return angle.cos(), angle.sin()


schedule = Trigonometric(power=1.5)
t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
alpha, sigma = schedule(t)
assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t))  # preserves the variance
assert (schedule.logsnr(t).diff() < 0).all()
assert torch.allclose(schedule.inverse(schedule.logsnr(t)), t)
for power in (0.7, 1.0, 1.5):
    plt.plot(t, Trigonometric(power).logsnr(t), label=f"power = {power}")
plt.gca().set(xlabel="t", ylabel="logSNR")
plt.legend()

# %% [markdown]
# Whether a sampler works on it can be known exactly: for N(m, s²), x_t at noise level t goes to
# m·α_s + √(α_s²·s² + σ_s²)/√(α_t²·s² + σ_t²)·(x_t − m·α_t).

# %%
m, s = 0.7, 0.4
exact = GaussianMixture(torch.tensor([[m]]).double(), torch.tensor([[s]]).double(), schedule)
start, stop = torch.tensor(0.95).double(), torch.tensor(0.05).double()
(alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(start), schedule(stop)
x_t = torch.linspace(-2, 2, 9).double()[:, None]
scale = ((alpha_s**2 * s**2 + sigma_s**2) / (alpha_t**2 * s**2 + sigma_t**2)).sqrt()
solution = m * alpha_s + scale * (x_t - m * alpha_t)
times = LogSNR()(schedule, 100, 0.95, 0.05)


def noise(step, draw=0):
    raise AssertionError("a deterministic sampler needs none")


error = (DPMSolverPP2M()(exact, x_t, times, noise=noise) - solution).abs().max()
print(f"largest error after 100 steps: {error:.1e}")
assert error < 1e-3

# %% [markdown]
# ## A backbone
#
# The network sees c_in·x_t, logSNR and the label; number K of K classes means no label. What it puts out is what the
# parameterization says.


# %%
class TinyConv(Backbone):
    """Three residual convolutions; noise level and class scale and shift every channel."""

    def __init__(self, channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.label = nn.Embedding(num_classes + 1, width)
        self.level = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, logsnr, label=None):
        if label is None:
            label = torch.full((len(x),), self.label.num_embeddings - 1, device=x.device)
        level = torch.stack([logsnr / 8, (logsnr / 4).tanh()], 1)
        hidden = self.level[1](self.level[0](level) + self.label(label))
        parts = self.level[2](hidden)[..., None, None].chunk(6, dim=1)
        h = self.first(x)
        for k, block in enumerate(self.blocks):
            h = h + block(nn.functional.silu(h * (1 + parts[2 * k]) + parts[2 * k + 1]))
        return self.last(nn.functional.silu(h))


x = torch.randn(4, 1, 8, 8)
network = TinyConv(channels=1, num_classes=2)
output = network(x, torch.zeros(4), torch.tensor([0, 1, 0, 1]))
assert output.shape == x.shape
# every sample on its own
assert torch.allclose(network(x[:2], torch.zeros(2), torch.tensor([0, 1])), output[:2], atol=1e-5)

# %% [markdown]
# ## A data set
#
# Discs and squares of random size and place, 8×8 pixels: two classes. Random numbers come from keys, so that the data
# are the same everywhere.


# %%
class Shapes(MapSource):
    """Discs and squares."""

    @property
    def class_names(self):
        return ("disc", "square")

    def prepare(self):
        """Nothing to download."""

    def inspect(self):
        return Found("the notebook", 1, 8, 8, 2, 800, 200)

    def load(self, name):
        index = torch.arange(800) if name == "train" else torch.arange(800, 1000)
        u = Keys(0, index).uniform("shape", 3)
        row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        y, x = (row - (2.5 + 2 * u[:, 0, None, None])).abs(), (column - (2.5 + 2 * u[:, 1, None, None])).abs()
        radius = 1.5 + u[:, 2, None, None]
        label = index % 2
        distance = torch.where(label[:, None, None] == 0, (x**2 + y**2).sqrt(), torch.maximum(x, y))
        images = ((radius - distance + 0.5).clamp(0, 1) * 255).to(torch.uint8)
        return TensorImages(images[:, None], label)


# %% [markdown]
# ## One YAML file each
#
# `_target_` names the class; in a package of your own it is `mypkg.Trigonometric` instead of
# `__main__.Trigonometric`. The other keys are its arguments, and what is misspelt or of a wrong type is refused before
# anything is built.

# %%
files = {
    "schedule/trig.yaml": "_target_: __main__.Trigonometric\npower: 1.0\n",
    "backbone/tiny_conv.yaml": (
        "_target_: __main__.TinyConv\nchannels: ${data.channels}\nnum_classes: ${data.num_classes}\nwidth: 32\n"
    ),
    "data/shapes.yaml": (
        "_target_: __main__.Shapes\nname: shapes\nchannels: 1\nimage_size: 8\nnum_classes: 2\n"
        "batch_size: 64\nflip: false\nnum_workers: 0\n"
    ),
}
for name, text in files.items():
    (FOLDER / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / "conf" / name).write_text(text)

settings = [
    f"--config-dir={FOLDER}/conf",
    "name=shapes",
    "schedule=trig",
    "schedule.power=1.2",
    "backbone=tiny_conv",
    "data=shapes",
    "extractor=none",
    f"training.max_steps={STEPS}",
    "evaluation.every_n_steps=0",
    "evaluation.num_samples=0",
    "evaluation.per_class=10",
    "progress_bar=false",
    "trainer=cpu",
    f"runs_dir={FOLDER}/runs",
]
code = diffx(["train", *settings])
assert code == 0

# %% [markdown]
# The run directory has the class and its arguments in the frozen config; samples of both classes, discs above:

# %%
(run,) = find_runs(FOLDER / "runs")
print(run.path.parent.name, run.config()["schedule"])
assert run.config()["schedule"] == {"_target_": "__main__.Trigonometric", "power": 1.2}
display(Image(run.samples / "final.png"))

# %% [markdown]
# A mistake is one sentence:

# %%
from diffx.utils import DiffxError

try:
    diffx(["train", *settings, "schedule.power=steep"])
except DiffxError as error:
    print(error)
    said = str(error)
assert "schedule.power must be a number" in said
