"""`diffx plan` tells objectives apart by what they weigh, and what they cost; `diffx parts` describes what there is."""

import re

import pytest
import torch
from conftest import build, choices
from PIL import Image
from test_cli import TINY, run

from diffx.cli.parts import GROUPS, page, parts
from diffx.cli.paths import config_dir
from diffx.denoisers import Preconditioned
from diffx.objectives import ELBO
from diffx.objectives.effective_weight import (
    effective_weight,
    effective_weight_of_bound,
    effective_weight_of_steps,
)
from diffx.utils import Keys

F64 = torch.float64


def weight(schedule="cosine", parameterization="v", weighting="unit", time_sampler="uniform", **settings):
    denoiser = Preconditioned(
        torch.nn.Identity(), build("schedule", schedule, **settings), build("parameterization", parameterization)
    )
    return effective_weight(denoiser, build("time_sampler", time_sampler), build("weighting", weighting))


def test_the_effective_weight_of_cosine_and_eps_is_the_known_one():
    # Kingma and Gao (arXiv 2303.00848), Tab. 1: uniform times on the cosine schedule, ε-loss: sech(λ/2)/2π
    found = weight("cosine", "eps", "unit", s=1e-9)
    grid = torch.linspace(-6, 6, 25, dtype=F64)
    torch.testing.assert_close(found.at(grid), 1 / (2 * torch.pi * torch.cosh(grid / 2)), rtol=0.02, atol=0)


def test_edm_density_and_weighting_give_edm_weight():
    # Karras et al. (arXiv 2206.00364), Tab. 1: ln σ ~ N(−1.2, 1.2²), weight (σ² + ½²)/(½σ)²
    found = weight("edm", "edm", "edm", "lognormal")
    grid = torch.linspace(-2, 6, 9, dtype=F64)
    sigma = torch.exp(-grid / 2)
    density = torch.exp(-(((sigma.log() + 1.2) / 1.2) ** 2) / 2) / (1.2 * (2 * torch.pi) ** 0.5) / 2
    torch.testing.assert_close(
        found.at(grid), density * (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * sigma**2, rtol=0.02, atol=0
    )


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        ({"parameterization": "eps"}, {"parameterization": "x0", "weighting": "snr"}, 1.0),
        ({"schedule": "cosine", "time_sampler": "lognormal"}, {"schedule": "linear", "time_sampler": "lognormal"}, 1.0),
        ({"parameterization": "eps"}, {"parameterization": "x0"}, None),
        ({"schedule": "cosine"}, {"schedule": "linear"}, None),
    ],
)
def test_equal_objectives_are_recognised(one, other, factor):
    found = weight(**one).factor(weight(**other))
    assert found == (None if factor is None else pytest.approx(factor, rel=0.03))


def test_the_command_names_equal_arms_and_those_that_cannot_work(capsys, tmp_path):
    argv = ["schedule=cosine,zero_snr", "parameterization=eps,x0", "weighting=snr,unit", "seed=0,1", "probe=false"]
    code, out, _ = run(capsys, "plan", *argv, f"out={tmp_path}/plan.png")
    flat = " ".join(out.split())
    assert code == 2
    assert "arms 1, 2, 3 minimise the same loss" in flat  # eps snr, eps unit, x0 snr
    assert "arm 5 cannot work: parameterization Eps is undefined" in flat
    assert flat.count("0,1") >= 6  # both seeds of the six arms that work
    with Image.open(tmp_path / "plan.png") as image:
        image.load()
    argv = ["schedule=cosine,edm", "time_sampler=uniform", "probe=0"]
    code, out, _ = run(capsys, "plan", *argv, f"out={tmp_path}/plan.svg")
    assert code == 0 and "no two arms are the same objective" in out
    code, _, err = run(capsys, "plan", f"out={tmp_path}/plan.doc")
    assert code == 2 and "neither .png" in err


def test_the_bound_weighs_all_noise_levels_alike():
    # Kingma and Gao (arXiv 2303.00848): uniform weighting is the bound; weighting=elbo is its mean over 64 dimensions
    found = weight("linear", "v", "elbo", "uniform")
    denoiser = Preconditioned(torch.nn.Identity(), build("schedule", "linear"), build("parameterization", "v"))
    bound = effective_weight_of_bound(denoiser, 11.0, 64)
    assert bound.factor(found) == pytest.approx(64, rel=0.03)
    assert bound.logsnr[-1] == pytest.approx(11.0)
    denoiser.schedule = build("schedule", "learned")  # it ends at 13.3
    assert effective_weight_of_bound(denoiser, 30.0, 64).logsnr[-1] == pytest.approx(13.3)


def test_the_bound_is_weighed_as_it_is_trained():
    # ∫ W·(mean of ‖ε̂ − ε‖²) dλ is what the objective's diffusion term estimates, here for x̂ = 0
    class Zero(torch.nn.Module):
        def forward(self, x, logsnr):
            return torch.zeros_like(x)

    denoiser = Preconditioned(Zero(), build("schedule", "linear"), build("parameterization", "x0"))
    keys, logsnr_max = Keys(0, torch.arange(20000)), 2.0
    x = 0.1 * keys.normal("x", 6, dtype=F64)
    with torch.no_grad():
        trained = ELBO(logsnr_max, levels=0)(denoiser, x, keys)["diffusion"]
    W = effective_weight_of_bound(denoiser, logsnr_max, 6)
    error = W.logsnr.exp() * x.square().mean()
    assert torch.trapezoid(W.weight * error, W.logsnr) == pytest.approx(trained.mean().item(), rel=0.05)


def test_objectives_without_a_time_sampler_of_their_own_are_told_apart_too(capsys, tmp_path):
    argv = ["objective=denoising,elbo,hybrid", "denoiser=learned_variance", "schedule=ddpm", "time_sampler=uniform"]
    code, out, _ = run(capsys, "plan", *argv, "probe=false", f"out={tmp_path}/plan.png")
    rows = [[cell.strip() for cell in line.split("│")[2:-1]] for line in out.splitlines() if line.startswith("│")]
    denoising, elbo, hybrid = ({"objective": row[0], "W": row[4:]} for row in rows)
    assert code == 0
    assert (denoising["objective"], elbo["objective"], hybrid["objective"]) == ("denoising", "elbo", "hybrid")
    assert elbo["W"] == ["1"] * 5
    assert hybrid["W"] == denoising["W"]
    flat = " ".join(out.split())
    assert "arm 2: W is that of the bound's integral" in flat
    assert "arm 3: W is that of the simple loss; the bound that is added trains the variances alone" in flat


def test_a_discrete_objective_has_no_levels_beyond_its_first_step():
    denoiser = Preconditioned(torch.nn.Identity(), build("schedule", "ddpm"), build("parameterization", "eps"))
    parts = denoiser, build("time_sampler", "uniform"), build("weighting", "unit")
    steps, whole = effective_weight_of_steps(*parts, 1000), effective_weight(*parts)
    first = denoiser.schedule.logsnr(torch.tensor(1e-3, dtype=F64)).item()
    assert whole.logsnr[-1] > first + 1 and first - 0.2 < steps.logsnr[-1] <= first
    assert steps.at(torch.zeros(())) == whole.at(torch.zeros(()))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["objective=denoising"], True),
        (["objective=hybrid", "denoiser=learned_variance"], True),
        (["objective=denoising", "weighting=elbo"], True),
        (["objective=elbo"], False),
    ],
)
def test_a_learned_schedule_is_trained_by_the_bound_alone(words, refused, capsys, tmp_path):
    code, out, _ = run(capsys, "plan", "schedule=learned", *words, "probe=false", f"out={tmp_path}/plan.png")
    assert (code, "set objective=elbo" in " ".join(out.split())) == ((2, True) if refused else (0, False))
    if refused:
        code, _, err = run(capsys, "train", "schedule=learned", *words, *TINY, f"runs_dir={tmp_path}/runs")
        assert code == 2 and "objective=elbo" in err and err.count("\n") == 1
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("group", GROUPS)
def test_every_part_says_what_it_is_and_when_to_use_it(group):
    found = {part.name: part for part in parts(group)}
    assert list(found) == choices(group)
    for part in found.values():
        assert part.comment and part.summary.endswith("."), part.name
    assert sum(bool(part.when) for part in found.values()) >= (len(found) + 1) // 2


@pytest.mark.parametrize("group", ["schedule", "weighting", "time_sampler", "sampler", "guidance"])
def test_every_part_of_the_design_space_names_its_source(group):
    for part in parts(group):
        if part.name not in ("none", "stacked", "uniform", "stratified"):
            assert re.search(r"\d{4}\.\d{5}|\(\d{4}\)|diffusers|k-diffusion", part.comment + part.body), part.name


def test_the_shipped_page_is_what_the_command_writes():
    assert (config_dir().parent / "docs/parts.md").read_text(encoding="utf-8") == page(list(GROUPS)), (
        "run: diffx parts out=docs/parts.md"
    )


def test_mistakes_are_named(capsys):
    code, _, err = run(capsys, "parts", "samplers")
    assert code == 2 and "did you mean" in err
