"""The kill drill, and that it can fail."""

import pytest
import torch
from test_cli import TINY

from diffx.cli import main as cli
from diffx.experiment import Run
from diffx.experiment.same import differences

ARM = [
    *[word for word in TINY if not word.startswith(("training.", "evaluation.", "log_every", "data.batch"))],
    "data.batch_size=8",
    "training.max_steps=330",
    "checkpoint.every_n_steps=15",
    "evaluation.every_n_steps=30",
    "evaluation.interim_samples=60",
    "evaluation.num_samples=300",
    "evaluation.batch_size=20",
    "evaluation.reference=test",
    "evaluation.per_class=1",
    "metrics=[fd,is]",
    "log_every_n_steps=5",
]


def test_twenty_kills_at_every_moment_change_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main(["drill", *ARM, "kills=20", f"out={tmp_path}"])
    said = capfd.readouterr().out
    assert stop.value.code == 0, said
    assert "the same, bit for bit, after 20 kills" in said
    # each signal at each of the four moments
    rows = [line for line in said.splitlines() if "SIG" in line and "│" in line]
    assert [[int(cell) for cell in row.split("│")[2:6]] for row in rows] == [[1] * 4] * 5


@pytest.fixture
def pair(tmp_path):
    """Two finished runs that came to the same."""
    found = []
    for name in ("a", "b"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *TINY, f"runs_dir={tmp_path / name}"])
        assert stop.value.code == 0
        (config,) = (tmp_path / name).glob("*/*/seed0/config.yaml")
        found.append(Run(config.parent))
    return found


def test_every_kind_of_difference_is_found(pair):
    ours, theirs = pair
    assert differences(ours, theirs) == []
    file = ours.newest_checkpoint()[0]
    original = file.read_bytes()

    def changed(change):
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
        found = differences(ours, theirs)
        file.write_bytes(original)
        return found

    name = "denoiser.backbone.out.weight"
    key = next((key for key in torch.load(file, weights_only=True)["state_dict"] if key.startswith("denoiser.")), name)

    def nudge(state):
        value = state["state_dict"][key].view(-1)
        value[0] = torch.nextafter(value[0], value[0] + 1)

    assert changed(nudge) == [f"state_dict/{key}"]
    assert changed(lambda state: state["optimizer_states"][0]["state"][0]["step"].add_(1)) == [
        "optimizer_states/0/state/0/step"
    ]
    metrics = ours.path / "metrics.csv"
    text = metrics.read_text()
    metrics.write_text(text + text.splitlines()[-1] + "\n")
    assert any(found.startswith("metrics.csv: ") for found in differences(ours, theirs))
    metrics.write_text(text)
    (evaluation,) = ours.evaluations.glob("*.json")
    evaluation.rename(evaluation.with_name("other.json"))
    assert any(found.startswith("evaluations") for found in differences(ours, theirs))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["kills=many"], "kills must be a whole number"), (["runs_dir=x"], "give out=FOLDER instead of runs_dir")],
)
def test_mistakes(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["drill", *ARM, *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err
