"""`diffx plan` tells objectives apart by what they weigh, and `diffx parts` describes what there is."""

import re

import pytest
import torch
from conftest import build, choices
from PIL import Image
from test_cli import run

from diffx.cli.parts import GROUPS, page, parts
from diffx.cli.paths import config_dir
from diffx.denoisers import Preconditioned
from diffx.objectives.effective_weight import effective_weight

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
    argv = ["schedule=cosine,zero_snr", "parameterization=eps,x0", "weighting=snr,unit", "seed=0,1"]
    code, out, _ = run(capsys, "plan", *argv, f"out={tmp_path}/plan.png")
    flat = " ".join(out.split())
    assert code == 2
    assert "arms 1, 2, 3 minimise the same loss" in flat  # eps snr, eps unit, x0 snr
    assert "arm 5 cannot work: parameterization Eps is undefined" in flat
    assert flat.count("0,1") >= 6  # both seeds of the six arms that work
    with Image.open(tmp_path / "plan.png") as image:
        image.load()
    code, out, _ = run(capsys, "plan", "schedule=cosine,edm", "time_sampler=uniform", f"out={tmp_path}/plan.svg")
    assert code == 0 and "no two arms are the same objective" in out
    code, _, err = run(capsys, "plan", f"out={tmp_path}/plan.doc")
    assert code == 2 and "neither .png" in err


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
