"""A denoiser that is told the noise level by numbers gives the estimate that it gives at the time."""

import pytest
import torch
from conftest import F64, build, choices, complete
from torch import nn

from diffx.conditioning import LabelConditioner
from diffx.denoisers import LearnedVariance, Preconditioned, Rescheduled
from diffx.guidance import ClassifierGuidance
from diffx.utils import DiffxError

TIMES = torch.tensor([1.0, 0.999, 0.7, 0.31, 0.05, 1e-3], dtype=F64)


class Network(nn.Module):
    """Knows its input and the noise level; one output channel or two."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, logsnr, label=None):
        output = torch.sin(3 * x) + 0.1 * logsnr.reshape(-1, 1, 1, 1)
        return torch.cat([output] * self.outputs, dim=1)


@pytest.mark.parametrize("kind", [Preconditioned, LearnedVariance])
@pytest.mark.parametrize("parameterization", choices("parameterization"))
@pytest.mark.parametrize("schedule", complete("schedule"))
def test_the_level_gives_what_the_time_gives(schedule, parameterization, kind):
    parts = build("schedule", schedule), build("parameterization", parameterization)
    try:
        denoiser = kind(Network(kind.outputs), *parts).double()
    except DiffxError as refused:
        assert "undefined" in str(refused)  # at the end of the schedule, where α is 0
        return
    x = torch.randn(3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for level in denoiser.schedule.levels(TIMES):
            told = denoiser.at(level)
            assert told is not denoiser and denoiser.known is None
            torch.testing.assert_close(told(x, level.t), denoiser(x, level.t), rtol=1e-9, atol=1e-9)


class Classifier(nn.Module):
    """Logits of two classes."""

    def forward(self, u, logsnr):
        return torch.stack([u.flatten(1).sin().sum(1), 0.1 * logsnr], dim=1)


@pytest.mark.parametrize("around", ["classifier", "another schedule", "both"])
@pytest.mark.parametrize("schedule", complete("schedule"))
def test_what_is_around_it_is_told_too(schedule, around, monkeypatch):
    trained = Preconditioned(Network(1), build("schedule", "cosine"), build("parameterization", "v")).double()
    denoiser = trained if around == "classifier" else Rescheduled(trained, build("schedule", schedule).double())
    if around != "another schedule":
        denoiser = ClassifierGuidance(denoiser, LabelConditioner(2), Classifier(), 2.0, [0.05, 50])
    x = torch.randn(3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    cond = {"label": torch.tensor([0, 1, 0])} if around != "another schedule" else {}
    levels = denoiser.schedule.levels(TIMES)
    with torch.no_grad():
        expected = [denoiser(x, level.t, **cond) for level in levels]
        along = denoiser.for_trajectory()
        for schedule in (denoiser.schedule, trained.schedule):
            monkeypatch.setattr(schedule, "forward", None)  # no schedule is evaluated on the device
        for level, estimate in zip(levels, expected, strict=True):
            torch.testing.assert_close(along.at(level)(x, level.t, **cond), estimate, rtol=1e-7, atol=1e-7)


def test_a_level_of_tensors_decides_nothing():
    denoiser = Preconditioned(Network(1), build("schedule", "cosine"), build("parameterization", "v"))
    x = torch.zeros(3, 1, 2, 2)
    assert denoiser.at(denoiser.schedule.level(torch.tensor([0.1, 0.5, 0.9]), x)) is denoiser
