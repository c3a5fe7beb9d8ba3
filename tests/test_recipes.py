"""Published recipes say what they reproduce, and are what their comments claim."""

import math
import re

import pytest
import torch
from conftest import CONFIGS, build, choices
from test_product import STAND_INS

from diffx.cli.budget import set_steps
from diffx.cli.build import _backbone, make
from diffx.cli.compose import compose_config

torch.set_num_threads(1)

# parameters of the network and evaluations per sample (guidance doubles the network's), each with its source
RECIPES = {
    "ddpm_cifar10": (35_746_307, 1000),  # arXiv 2006.11239 App. B: 35.7 million
    "iddpm_cifar10": (52_546_438, 4000),  # the released network, counted ("50M")
    "iddpm_cifar10_simple": (52_542_979, 4000),  # the same with three output channels
    "edm_cifar10": (55_735_299, 35),  # the released network, counted
    "edm_cifar10 backbone=ncsnpp_cifar10": (56_400_643, 35),  # likewise
    "edm_cifar10_uncond": (55_733_891, 35),  # likewise
    "edm_cifar10_uncond backbone=ncsnpp_cifar10": (56_397_827, 35),  # likewise
    "vdm_cifar10": (30_586_243, 1000),  # follows from arXiv 2107.00630 App. B (test_backbones.py)
    "flow_matching_cifar10": (171_268_099, 141),  # follows from arXiv 2210.02747 table 3 (test_backbones.py)
    "simple_imagenet128": (920_823_299, 512),  # follows from its layers (test_backbones.py)
    # arXiv 2212.09748: 675,129,632 as its authors count, 256 positions of 1152 channels among them
    "dit_imagenet256": (675_129_632 - 256 * 1152, 250),
    # arXiv 2401.08740: DiT's, here without the four output channels that are thrown away
    "sit_imagenet256": (675_129_632 - 256 * 1152 - 16 * 1152 - 16, 249),
}
PUBLISHED = [name for name in choices("experiment") if "arXiv" in (CONFIGS / f"experiment/{name}.yaml").read_text()]
PUBLISHED = [name for name in PUBLISHED if name != "digits_edm"]  # the demo


def composed(words):
    experiment, *overrides = words.split()
    return compose_config(
        "train", [*overrides, *STAND_INS.get(experiment, []), f"experiment={experiment}"], [], set_steps
    )


def test_every_recipe_is_in_the_table():
    assert sorted(PUBLISHED) == sorted({words.split()[0] for words in RECIPES})


@pytest.mark.parametrize("words", RECIPES)
def test_network_and_evaluations_are_the_published_ones(words):
    config = composed(words)
    parameters, nfe = RECIPES[words]
    with torch.device("meta"):
        network = _backbone(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    steps = config["sampler"].pop("steps")
    assert make(config, "sampler").nfe(steps) == nfe


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_they_reproduce(name):
    text = (CONFIGS / f"experiment/{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    comment = " ".join(line[2:] for line in lines if line.startswith("# ") and "@package" not in line)
    assert re.search(r"arXiv \d{4}\.\d{5}", comment)
    assert re.search(r"published (FID )?\d", comment)
    assert re.search(r"\d to [\d.]+.{0,90}would reproduce it", comment)
    assert "Not run to the end by us" in comment
    assert re.search(r"steps of batch|images in batches", comment)
    assert lines[-1].strip() and max(map(len, lines)) <= 125
    if name != "ddpm_cifar10":
        assert "Known deviations" in comment and "Cost" in comment
    assert f"name: {name}" in lines


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("edm")])
def test_edm_s_settings_in_images(name):
    config = composed(name)
    batch = config["data"]["batch_size"]
    assert config["training"]["max_steps"] * batch == 200_000_000
    assert config["lr_schedule"]["warmup_steps"] * batch == pytest.approx(10e6, rel=1e-4)
    assert config["ema"]["decay"] == pytest.approx(0.5 ** (batch / 500_000), abs=1e-8)
    assert not config["data"]["flip"] and config["backbone"]["augment_labels"] == 9
    assert config["optimizer"]["eps"] == pytest.approx(1e-8 / (3 * 32 * 32), rel=0.02)


def test_iddpm_s_schedule_is_the_clipped_one_to_a_thousandth():
    config = composed("iddpm_cifar10")
    steps = config["objective"]["steps"]
    assert steps == config["discretization"]["total"] == config["likelihood"]["steps"] == config["sampler"]["steps"]

    def bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = [1 - min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)]
    expected = torch.tensor(kept, dtype=torch.float64).cumprod(0)
    schedule = build("schedule", "cosine", alpha_bar_min=config["schedule"]["alpha_bar_min"])
    alpha, sigma = schedule(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    ratio = alpha**2 / expected
    assert ratio[:-1].sub(1).abs().max() < 2e-3
    assert ratio[-1].item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
