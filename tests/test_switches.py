"""The switches for speed: what `trainer` turns on, what a plan says of those that are off, what is refused."""

import re
import signal
from pathlib import Path

import pytest
import torch
from test_cli import TINY, run
from test_training import metrics_of, signal_at, trained
from torch import nn

from diffx.cli import plan, switches
from diffx.cli.build import build
from diffx.cli.compose import compose_config
from diffx.cli.estimate import Gain
from diffx.cli.switches import check_switches, switch_on, variants
from diffx.cli.types import check_types
from diffx.utils import DiffxError


def config(*words):
    return compose_config("train", [*TINY, *words], [])


def test_trainer_gpu_turns_on_what_is_safe_and_fast():
    on = config("trainer=gpu")
    assert on["training"]["precision"] == "bf16-mixed"
    assert on["trainer"]["compile"] is True and on["trainer"]["channels_last"] is True
    off = config("trainer=cpu")
    assert off["training"]["precision"] == "32-true"
    assert not off["trainer"]["compile"] and not off["trainer"]["channels_last"]
    assert config("trainer=gpu", "trainer.precision=16-mixed")["training"]["precision"] == "16-mixed"
    assert config("trainer=gpu", "training.precision=32-true")["training"]["precision"] == "32-true"


def test_variants_are_what_is_to_be_typed():
    base = config("trainer=auto")
    for device in ("cpu", "cuda"):
        for words, changed in variants(base, device):
            assert config("trainer=auto", words) == changed
            check_types(changed)
    assert base == config("trainer=auto")


def test_what_is_off_is_named():
    words = [words for words, _ in variants(config("trainer=cpu"), "cpu")]
    assert {word.split("=")[0].split(".")[1] for word in words} == {
        "precision",
        "compile",
        "channels_last",
        "activation_checkpointing",
    }
    assert not any("overhead" in word for word in words)  # CUDA graphs
    # with everything on, what is left trades speed for memory, or start for speed
    left = [words.split("=")[0] for words, _ in variants(config("trainer=gpu"), "cuda")]
    assert set(left) == {"trainer.activation_checkpointing", "trainer.compile"}


@pytest.mark.parametrize("word", ["trainer.compile=fast", "trainer.activation_checkpointing=some"])
def test_a_wrong_switch_is_refused(word):
    with pytest.raises(DiffxError, match=word.split("=")[0]):
        check_types(config(word))


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(switches.shutil, "which", lambda name: None)
    check_switches(config())
    with pytest.raises(DiffxError, match="C\\+\\+ compiler"):
        check_switches(config("trainer.compile=true"))


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    with pytest.raises(DiffxError, match="16-mixed"):
        check_switches(config("trainer=gpu"))
    check_switches(config("trainer=gpu", "trainer.precision=16-mixed"))


@pytest.fixture
def asked(monkeypatch):
    """What `speed_up` is asked for, network by network."""
    calls = []
    monkeypatch.setattr(switches, "speed_up", lambda network, **words: calls.append((network, words)))
    return calls


def test_the_average_has_the_layout_of_the_weights_and_no_checkpointing(asked):
    chosen = config("trainer=gpu", "trainer.activation_checkpointing=full", "ema.decay=[0.9,0.99]")
    module = build(chosen).module
    switch_on(module, chosen["trainer"], "cuda")
    (first, words), *averages = asked
    assert first is module.denoiser.backbone and words["activation_checkpointing"] == "full"
    assert [network for network, _ in averages] == [e.backbone for e in module.ema.named().values()]
    assert all(w == {"compile": True, "channels_last": True} for _, w in averages)


def test_a_run_of_a_gpu_is_not_compiled_on_a_cpu(asked):
    chosen = config("trainer=gpu")
    module = build(chosen).module
    switch_on(module, chosen["trainer"], "cpu", training=False)
    assert [words for _, words in asked] == [{"compile": False, "channels_last": False}]


def test_a_plan_names_what_is_off(capsys, tmp_path, monkeypatch):
    words = ("plan", *TINY, "probe=false", f"out={tmp_path}/plan.png")
    code, out, _ = run(capsys, *words)
    assert code == 0 and "off: trainer.precision=bf16-mixed" in " ".join(out.split())
    monkeypatch.setattr(
        plan, "gains", lambda config, seconds: [Gain("", 10.0, 2**30, 1.0), Gain("a=b", 15.0, 2**29, 3.0)]
    )
    code, out, _ = run(capsys, *words, "switches=true")
    assert re.search(r"a=b\s+│\s+15\s+│\s+1.50\s+│ 0.50 GiB │ 0.50 │\s+3 s", out)
    code, _, err = run(capsys, *words, "switches=all")
    assert code == 2 and "switches=true" in err


def test_gains_are_tried_out(monkeypatch):
    from diffx.cli import estimate

    chosen = config()
    monkeypatch.setattr(estimate, "variants", lambda *_: [*variants(chosen, "cpu")][:1])
    alone, other = estimate.gains(chosen, seconds=0.05)
    assert alone.words == "" and other.words == "trainer.precision=bf16-mixed"
    assert min(alone.images_per_second, other.images_per_second, alone.memory, other.memory) > 0
    assert not alone.problem and not other.problem


EQUAL = {
    # the same operations in another order
    "trainer.channels_last=true": 1e-4,  # without drop-out, which is drawn in the order of the memory
    "trainer.compile=true": 1e-4,
    # the same operations, some of them twice
    "trainer.activation_checkpointing=full": 1e-6,
    "trainer.activation_checkpointing=selective": 1e-6,
    # eight bits of mantissa within the network
    "trainer.precision=bf16-mixed": 2e-2,
}


def curve(folder, *words):
    """The losses by the log, and eight samples, of a run."""
    code, arm, run = trained(folder, "training.max_steps=20", "sampler.steps=4", *words)
    assert code == 0
    losses = torch.tensor([float(row["loss"]) for row in metrics_of(run)])
    return losses, arm.generator(arm.module.ema.denoiser)(torch.arange(8)).images.float()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return curve(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("switch", EQUAL)
def test_a_switch_leaves_losses_and_samples_as_they_are(switch, tmp_path, monkeypatch, plain):
    if switch.startswith("trainer.compile"):
        compiled = nn.Module.compile
        # all of the compiler but its code generator, which would take a minute
        monkeypatch.setattr(nn.Module, "compile", lambda m, *a, mode=None, **k: compiled(m, backend="aot_eager", **k))
    losses, samples = curve(tmp_path, switch)
    assert len(losses) == 20
    torch.testing.assert_close(losses, plain[0], rtol=EQUAL[switch], atol=0)
    # of 255 levels: one where rounding decides, more where the network rounds
    assert (samples - plain[1]).abs().max() <= (1 if EQUAL[switch] < 1e-3 else 8)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_in_another_memory_layout(first, tmp_path, plain):
    # also its optimizer's state, which a fused kernel would mix up without a word
    words = ("training.max_steps=20", "sampler.steps=4")
    layout = {layout: f"trainer.channels_last={str(layout).lower()}" for layout in (True, False)}
    code, _, _ = trained(tmp_path, *words, layout[first], action=signal_at(signal.SIGTERM, 7))
    assert code == 128 + signal.SIGTERM
    code, _, run = trained(tmp_path, *words, layout[not first])
    assert code == 0
    losses = torch.tensor([float(row["loss"]) for row in metrics_of(run)])
    torch.testing.assert_close(losses, plain[0], rtol=1e-4, atol=0)


def test_every_switch_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    for key in config()["trainer"]:
        assert f"trainer.{key}" in page
