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
# # Anatomy of a denoiser
#
# A diffusion model is a denoiser: an estimate x̂(x_t, t) of E[x | x_t], where x_t = α(t)·x + σ(t)·z with z ~ N(0, I).
# For data from a mixture of Gaussians E[x | x_t] is known, so that every part can be looked at beside the exact
# solution: schedules, parameterizations, weightings, samplers, and a small network.

# %%
import math
import os

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

from diffx import parameterizations, weightings
from diffx.denoisers import Denoiser, Preconditioned
from diffx.discretizations import LogSNR
from diffx.objectives import Denoising
from diffx.samplers import DDIM, DDPM, Counted, DPMSolverPP2M, DPMSolverPP3M, Heun
from diffx.schedules import EDM, Cosine, Flow, Linear
from diffx.time_samplers import Stratified
from diffx.utils import Keys

STEPS = int(os.environ.get("DIFFX_NOTEBOOK_STEPS", "1000"))
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # tensors this small gain nothing from more


def picture(columns, height=2.8, width=2.9):
    _, axes = plt.subplots(1, columns, figsize=(width * columns, height), constrained_layout=True)
    return np.atleast_1d(axes)


# %% [markdown]
# ## The data and their exact denoiser
#
# x ~ Σ_k π_k N(μ_k, s_k²·I). Given x_t, component k has the probability r_k ∝ π_k N(x_t; α·μ_k, α²·s_k² + σ²), and
# within it the mean of x is μ_k + α·s_k²/(α²·s_k² + σ²)·(x_t − α·μ_k).

# %%
MU = torch.tensor([[-1.0, 0.5], [0.7, 1.0], [0.4, -1.2]])
S = torch.tensor([0.15, 0.25, 0.2])
PI = torch.tensor([0.5, 0.3, 0.2])


class Exact(Denoiser):
    """E[x | x_t] of the mixture."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t, **cond):
        alpha, sigma = (c.reshape(-1, 1) for c in self.schedule(t))
        variance = alpha**2 * S**2 + sigma**2  # [B or 1, K]
        away = x_t[:, None] - alpha[..., None] * MU  # [B, K, 2]
        r = (PI.log() - away.square().sum(-1) / (2 * variance) - variance.log()).softmax(-1)
        means = MU + (alpha * S**2 / variance)[..., None] * away
        return (r[..., None] * means).sum(1)


def data(n, seed=0):
    keys = Keys(seed, torch.arange(n))
    k = torch.searchsorted(PI.cumsum(0), keys.uniform("component", dtype=torch.float64)).clamp(max=2)
    return MU[k] + S[k, None] * keys.normal("x", 2, dtype=torch.float64)


x = data(2000)
z = Keys(1, torch.arange(2000)).normal("z", 2, dtype=torch.float64)
cosine = Cosine()
for axis, time in zip(picture(5, height=2.9), (0.0, 0.2, 0.4, 0.6, 1.0), strict=True):
    t = torch.tensor(time)
    alpha, sigma = cosine(t)
    x_t = alpha * x + sigma * z
    x_hat = Exact(cosine)(x_t, t)
    axis.scatter(*x_t.T, s=1, color="0.7", label="x_t")
    axis.scatter(*x_hat.T, s=1, color="tab:red", label="E[x | x_t]")
    axis.set(xlim=(-3, 3), ylim=(-3, 3), title=f"t = {time}, logSNR = {cosine.logsnr(t):.1f}")
axis.legend(markerscale=6, loc="upper right")

# %% [markdown]
# At t = 0 nothing is hidden and x̂ = x; at t = 1 nothing is seen and x̂ = E[x].

# %%
start, end = torch.tensor(0.0), torch.tensor(1.0)
assert torch.allclose(Exact(Linear())(x, start), x, atol=1e-3)
assert torch.allclose(Exact(Flow())(z, end), (PI[:, None] * MU).sum(0).expand_as(z), atol=1e-6)

# %% [markdown]
# ## Schedules
#
# A schedule says how t becomes α and σ. What an x_t tells is decided by logSNR = log α²/σ² alone: at equal logSNR, x_t
# of two schedules differ by a factor, and x̂ is the same.

# %%
schedules = {"linear": Linear(), "cosine": cosine, "flow": Flow(), "edm": EDM()}
t = torch.linspace(0.001, 0.999, 400)
left, middle, right = picture(3)
for name, schedule in schedules.items():
    alpha, sigma = schedule(t)
    left.plot(t, alpha, label=name)
    middle.plot(t, sigma.clamp(max=1.5))
    right.plot(t, schedule.logsnr(t))
left.set(title="α(t)", xlabel="t")
middle.set(title="σ(t), cut at 1.5", xlabel="t")
right.set(title="logSNR(t)", xlabel="t", ylim=(-12, 16))
left.legend()

estimates = []
for schedule in schedules.values():
    t = schedule.inverse(torch.tensor(-1.0))
    alpha, sigma = schedule(t)
    estimates.append(Exact(schedule)(alpha * x + sigma * z, t))
for estimate in estimates[1:]:
    assert torch.allclose(estimate, estimates[0], atol=1e-9)

# %% [markdown]
# ## Parameterizations
#
# The network F sees c_in·x_t, and x̂ = c_skip·x_t + c_out·F. Written backwards, F* = (E[x | x_t] − c_skip·x_t)/c_out is
# what a perfect network puts out. Where c_out is large, an error of F is a large error of x̂: ε at high noise, x₀ never.

# %%
outputs = {
    "eps": parameterizations.Eps(),
    "x0": parameterizations.X0(),
    "v": parameterizations.V(),
    "flow": parameterizations.FlowVelocity(),
    "edm": parameterizations.EDM(sigma_data=0.9),
}
t = torch.linspace(0.02, 0.98, 100)
logsnr = cosine.logsnr(t)
left, middle, right = picture(3)
for name, parameterization in outputs.items():
    c_in, c_skip, c_out = parameterization(*cosine(t))
    left.plot(logsnr, c_skip, label=name)
    middle.plot(logsnr, c_out.abs())
    power = []
    for k, time in enumerate(t):
        alpha, sigma = cosine(time)
        x_t = alpha * x + sigma * z
        x_hat = Exact(cosine)(x_t, time)
        target = (x_hat - c_skip[k] * x_t) / c_out[k]
        power.append(target.square().mean().sqrt().item())
    right.plot(logsnr, power)
left.set(title="c_skip", xlabel="logSNR")
middle.set(title="|c_out|", xlabel="logSNR", yscale="log")
right.set(title="size of F*", xlabel="logSNR", ylim=(0, 2))
left.legend()


class Perfect(nn.Module):
    """The network that makes a parameterization's denoiser the exact one."""

    def __init__(self, schedule, parameterization):
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, x, logsnr, label=None):
        t = self.schedule.inverse(logsnr)
        c_in, c_skip, c_out = (c[:, None] for c in self.parameterization(*self.schedule(t)))
        x_t = x / c_in
        return (Exact(self.schedule)(x_t, t) - c_skip * x_t) / c_out


t = Keys(2, torch.arange(2000)).uniform("t", dtype=torch.float64) * 0.9 + 0.05
alpha, sigma = (c[:, None] for c in cosine(t))
x_t = alpha * x + sigma * z
for parameterization in outputs.values():
    denoiser = Preconditioned(Perfect(cosine, parameterization), cosine, parameterization)
    assert torch.allclose(denoiser(x_t, t), Exact(cosine)(x_t, t), atol=1e-7)

# %% [markdown]
# ## Weightings
#
# The loss is the mean over t of w(t)·‖x̂ − x‖². In diffx w is always that of x̂, so that the parameterization does not
# change it, with one exception: `unit`, the mean squared error of F itself. Over logSNR, drawn uniformly in t, the
# weight that a noise level has is w·|dt/dlogSNR|.

# %%
t = torch.linspace(0.01, 0.99, 300)
logsnr = cosine.logsnr(t)
density = -1 / torch.gradient(logsnr, spacing=(t,))[0]
models = {name: Preconditioned(nn.Identity(), cosine, p) for name, p in outputs.items()}
left, right = picture(2, height=3.2, width=4.4)
for name, model in models.items():
    w = weightings.Unit()(model, t) * density
    left.plot(logsnr, w / w.max(), label=f"unit × {name}")
weights = {
    "snr": weightings.SNR(),
    "constant": weightings.Constant(),
    "min_snr": weightings.MinSNR(5.0),
    "p2": weightings.P2(),
    "edm, σ_d = 0.9": weightings.EDM(sigma_data=0.9),
}
for name, weighting in weights.items():
    w = weighting(models["v"], t) * density
    right.plot(logsnr, w / w.max(), label=name)
for axis in (left, right):
    axis.set(xlabel="logSNR", ylabel="weight / its maximum")
    axis.legend()

# the same objective under two names
assert torch.allclose(weightings.Unit()(models["eps"], t), weightings.SNR()(models["v"], t))
assert torch.allclose(weightings.Unit()(models["x0"], t), weightings.Constant()(models["v"], t))
assert torch.allclose(weightings.Unit()(models["v"], t), weightings.SNR()(models["v"], t) + 1)
assert torch.allclose(weightings.Unit()(models["edm"], t), weightings.EDM(sigma_data=0.9)(models["v"], t))

# %% [markdown]
# ## Samplers
#
# A deterministic sampler solves the probability-flow ODE. With the exact denoiser its only error is its own, measured
# against a solution with many small steps of a third-order solver. On a grid uniform in logSNR, twice as many steps
# of a sampler of order p leave 2^−p of the error.

# %%
exact = Exact(cosine)
grid = LogSNR()
n = 500
keys = Keys(3, torch.arange(n))


def noise(step, draw=0):
    return keys.at(step).normal(f"sampler/{draw}", 2, dtype=torch.float64)


def sampled(sampler, denoiser, steps, start=0.98, stop=0.02):
    x_T = keys.normal("sample", 2, dtype=torch.float64) * denoiser.schedule(torch.tensor(start))[1]
    with torch.no_grad():
        return sampler(denoiser, x_T, grid(denoiser.schedule, steps, start, stop), noise=noise)


solution = sampled(DPMSolverPP3M(), exact, 2000)
samplers = {"ddim": DDIM(), "heun": Heun(), "dpmpp_2m": DPMSolverPP2M(), "dpmpp_3m": DPMSolverPP3M()}
slopes = {}
(axis,) = picture(1, height=3.4, width=6)
for name, sampler in samplers.items():
    calls, errors = [], []
    for steps in (8, 16, 32, 64, 128):
        counted = Counted(exact)
        errors.append((sampled(sampler, counted, steps) - solution).square().sum(1).mean().sqrt().item())
        calls.append(counted.samples / n)
    slopes[name] = math.log2(errors[-2] / errors[-1])
    axis.loglog(calls, errors, "o-", label=f"{name}: order {slopes[name]:.1f} (declared {sampler.order})")
axis.set(xlabel="denoiser calls", ylabel="distance to the exact solution")
axis.legend()
for name, sampler in samplers.items():
    assert slopes[name] > sampler.order - 0.35, (name, slopes[name])

# %% [markdown]
# A stochastic sampler does not follow the ODE; its samples must have the right distribution. Five steps of each, and
# 200 of DDPM:

# %%
shown = {"data": x[:n]} | {f"{name}, 5 steps": sampled(s, exact, 5, 0.999, 0.0) for name, s in samplers.items()}
shown["ddpm, 200 steps"] = sampled(DDPM(), exact, 200, 0.999, 0.0)
for axis, (name, points) in zip(picture(6, height=2.9), shown.items(), strict=True):
    axis.scatter(*points.T, s=2)
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), title=name)
mean, scatter = x.mean(0), x.std(0)
assert torch.allclose(shown["ddpm, 200 steps"].mean(0), mean, atol=0.12)
assert torch.allclose(shown["ddpm, 200 steps"].std(0), scatter, atol=0.12)

# %% [markdown]
# ## A network
#
# The same small network, the same weighting, three parameterizations. What is left between the network and the exact
# denoiser depends on the noise level.


# %%
class Net(nn.Module):
    """A small fully connected network of x and logSNR."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x, logsnr, label=None):
        level = logsnr[:, None] / 4
        return self.layers(torch.cat([x, level, level.sin(), level.cos(), (2 * level).sin()], 1))


def trained(parameterization):
    torch.manual_seed(0)
    denoiser = Preconditioned(Net(), cosine, parameterization)
    objective = Denoising(Stratified(), weightings.MinSNR(5.0))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        batch = Keys(4, step * 256 + torch.arange(256))
        loss = objective(denoiser, data(256, seed=100 + step), batch)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser.requires_grad_(False)


def distance(denoiser, time):
    """‖x̂ − E[x | x_t]‖² over ‖x̂₀ − E[x | x_t]‖², where x̂₀ = E[x] knows nothing."""
    t = torch.tensor(time).expand(len(x))
    alpha, sigma = (c[:, None] for c in cosine(t))
    x_t = alpha * x + sigma * z
    truth = exact(x_t, t)
    ignorant = (PI[:, None] * MU).sum(0)
    return ((denoiser(x_t, t) - truth).square().mean() / (ignorant - truth).square().mean()).item()


times = np.linspace(0.05, 0.95, 19)
networks = {name: trained(outputs[name]) for name in ("eps", "x0", "v")}
(axis,) = picture(1, height=3.4, width=6)
for name, network in networks.items():
    axis.semilogy(cosine.logsnr(torch.tensor(times)), [distance(network, time) for time in times], "o-", label=name)
axis.set(xlabel="logSNR", ylabel="distance from E[x | x_t]")
axis.legend()

if STEPS >= 1000:
    assert all(distance(network, 0.5) < 0.05 for network in networks.values())

# %% [markdown]
# Samples of the three networks by 20 steps of DPM-Solver++(2M), in float64 like everything here:

# %%
panels = {"exact denoiser": sampled(DPMSolverPP2M(), exact, 20, 0.999, 0.0)}
panels |= {name: sampled(DPMSolverPP2M(), network, 20, 0.999, 0.0) for name, network in networks.items()}
for axis, (name, points) in zip(picture(4, height=2.9), panels.items(), strict=True):
    axis.scatter(*points.T, s=2)
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), title=name)
