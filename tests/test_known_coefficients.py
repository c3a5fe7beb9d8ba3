"""A denoiser that is told the noise level by numbers gives the estimate that it gives at the time."""

import pytest
import torch
from conftest import F64, build, choices, complete
from torch import nn

from diffx.denoisers import LearnedVariance, Preconditioned
from diffx.utils import DiffxError

TIMES = torch.tensor([1.0, 0.999, 0.7, 0.31, 0.05, 1e-3], dtype=F64)


class Network(nn.Module):
    """Knows its input and the noise level; one output channel or two."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, logsnr):
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


def test_a_level_of_tensors_decides_nothing():
    denoiser = Preconditioned(Network(1), build("schedule", "cosine"), build("parameterization", "v"))
    x = torch.zeros(3, 1, 2, 2)
    assert denoiser.at(denoiser.schedule.level(torch.tensor([0.1, 0.5, 0.9]), x)) is denoiser
