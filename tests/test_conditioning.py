"""Conditions are dropped as often as asked, the same whatever the batch, and what is no class is refused."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffx.conditioning import Conditioner, LabelConditioner, Unconditional
from diffx.utils import DiffxError, Keys

CONFIGS = Path(__file__).parents[1] / "configs"
N = 20_000


def batch(n=N, start=0):
    index = torch.arange(start, start + n)
    return {"x": torch.zeros(n, 1, 1, 1, dtype=torch.uint8), "label": index % 10, "index": index}


def build(path, num_classes=10):
    config = OmegaConf.create({"data": {"num_classes": num_classes}, "conditioning": OmegaConf.load(path)})
    return instantiate(config).conditioning


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("conditioning/*.yaml")), ids=lambda path: path.stem)
def test_null_conditions_look_like_conditions(path):
    conditioner = build(path)
    assert isinstance(conditioner, Conditioner)
    conditions, null = conditioner(batch(6)), conditioner.null(6, "cpu")
    assert {k: (v.shape, v.dtype) for k, v in conditions.items()} == {k: (v.shape, v.dtype) for k, v in null.items()}
    for name, value in conditioner(batch(6), Keys(0, torch.arange(6))).items():
        assert value.shape == null[name].shape


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_sample_by_sample_at_the_given_rate(dropout):
    label = LabelConditioner(10, dropout)(batch(), Keys(0, batch()["index"]))["label"]
    dropped = label == 10
    error = (dropout * (1 - dropout) / N) ** 0.5
    assert abs(dropped.float().mean().item() - dropout) <= 5 * error
    assert torch.equal(label[~dropped], batch()["label"][~dropped])
    if 0 < dropout < 1:
        # per sample, not per batch: in batches of 100 the number dropped spreads as a binomial one does
        spread = dropped.reshape(-1, 100).sum(1).float().std().item()
        assert spread == pytest.approx((100 * dropout * (1 - dropout)) ** 0.5, rel=0.25)


def test_drops_depend_on_seed_and_sample_number_only():
    conditioner = LabelConditioner(10, 0.3)
    whole = conditioner(batch(64), Keys(7, torch.arange(64)))["label"]
    for size in (1, 16, 32):
        parts = [conditioner(batch(size, k), Keys(7, torch.arange(k, k + size)))["label"] for k in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(conditioner(batch(64), Keys(8, torch.arange(64)))["label"], whole)
    next_epoch = conditioner(batch(64), Keys(7, torch.arange(64) + 64))["label"]
    assert not torch.equal(next_epoch == 10, whole == 10)


def test_nothing_is_dropped_without_keys_and_the_batch_is_left_alone():
    conditioner, data = LabelConditioner(10, 1.0), batch(8)
    assert torch.equal(conditioner(data)["label"], data["label"])
    assert conditioner(data, Keys(0, data["index"]))["label"].tolist() == [10] * 8
    assert torch.equal(data["label"], batch(8)["label"])
    assert conditioner.null(3)["label"].tolist() == [10] * 3


def test_unconditional_says_nothing():
    conditioner = Unconditional()
    assert conditioner(batch(3), Keys(0, torch.arange(3))) == {} and conditioner.null(3) == {}
    with pytest.raises(DiffxError, match="leave the label out"):
        conditioner.check(0)


def test_labels_for_sampling_are_checked():
    conditioner = LabelConditioner(10)
    for label in (0, 9):
        conditioner.check(label)
    for label in (-1, 10, 3.0, "cat"):
        with pytest.raises(DiffxError, match="from 0 to 9"):
            conditioner.check(label)


def test_impossible_settings_are_refused():
    with pytest.raises(DiffxError, match="set conditioning=none"):
        LabelConditioner(0)
    for dropout in (-0.1, 1.5):
        with pytest.raises(DiffxError, match=r"conditioning.dropout"):
            LabelConditioner(10, dropout)
