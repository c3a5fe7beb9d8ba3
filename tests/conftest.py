"""What the tests share: the parts named by the YAML files, data whose denoiser is known, keyed noise."""

import itertools
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffx.denoisers import GaussianMixture
from diffx.utils import Keys

CONFIGS = Path(__file__).parents[1] / "configs"
F64 = torch.float64


def choices(group):
    """The choices of a config group, by their file names, so that a new file is tested without a change here."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def build(group, choice, **overrides):
    """The object that a YAML file describes."""
    config = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")
    if group == "sampler":
        config.pop("steps", None)  # the generator's, not the class's
    return instantiate(config, **overrides)


def complete(group):
    """The choices that need nothing from the user."""
    return [c for c in choices(group) if "???" not in (CONFIGS / group / f"{c}.yaml").read_text(encoding="utf-8")]


def each(group):
    """Parametrizes a test over the choices of a group; the argument has the group's name."""
    import pytest

    return pytest.mark.parametrize(group, choices(group))


def in_pairs(*families):
    """Combinations of one of each family in which every two choices of different families meet at least once."""
    by_size = sorted(range(len(families)), key=lambda i: -len(families[i]))
    first, second, *others = (families[i] for i in by_size)
    rows = []
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        # a third family runs along the diagonals; a fourth along others, that it meet the third
        row = [a, b, *(family[(i + j + (j // len(others[0])) * k) % len(family)] for k, family in enumerate(others))]
        rows.append(tuple(value for _, value in sorted(zip(by_size, row, strict=True))))
    return rows


def mixture(schedule, dtype=F64):
    """Three bumps in two dimensions, none symmetric to another: its denoiser is far from linear."""
    return GaussianMixture(
        means=torch.tensor([[-1.0, 0.5], [0.7, 1.0], [0.4, -1.2]], dtype=dtype),
        stds=torch.tensor([[0.3, 0.2], [0.25, 0.4], [0.2, 0.3]], dtype=dtype),
        schedule=schedule,
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=dtype),
    )


def gaussian(schedule, mean, std):
    """One Gaussian in one dimension."""
    return GaussianMixture(torch.tensor([[mean]], dtype=F64), torch.tensor([[std]], dtype=F64), schedule)


def keyed_noise(index, shape, seed=0, dtype=F64):
    """`noise(step, draw=0)` for samples of the given global numbers."""
    return partial(_keyed_noise, seed, torch.as_tensor(index), shape, dtype)


def _keyed_noise(seed, index, shape, dtype, step, draw=0):
    return Keys(seed, index, step).normal(f"sampler/{draw}", *shape, dtype=dtype)


def no_noise(*args, **kwargs):
    raise AssertionError("a deterministic sampler asked for noise")


def is_stochastic(sampler):
    """Whether the sampler asks for noise, found out by a short run."""
    asked = []

    def noise(step, draw=0):
        asked.append(step)
        return torch.zeros(1, 1, dtype=F64)

    denoiser = gaussian(build("schedule", "linear"), 0.0, 1.0)
    sampler(denoiser, torch.ones(1, 1, dtype=F64), torch.tensor([0.9, 0.6, 0.3], dtype=F64), noise=noise)
    return bool(asked)
