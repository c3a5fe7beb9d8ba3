"""Compilation, memory order and checkpointing leave outputs, gradients and keys as they are."""

import copy
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from diffx.backbones import Backbone, DiT, FlatUNet, ScoreUNet, SimpleUNet, UNet, speed_up
from diffx.nn import SelfAttention
from diffx.utils import DiffxError

COMMON = {"num_classes": 3, "out_channels": 4}


class Mine(Backbone):
    """As a user may write one: it names no parts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 1))

    def forward(self, x, logsnr, label=None):
        return self.layers(x) * logsnr.sigmoid()[:, None, None, None]


NETWORKS = {
    "unet": lambda p: UNet(2, 8, 8, [1, 2], 1, [4], groups=4, dropout=p, **COMMON),
    "ddpm": lambda p: UNet(2, 8, 8, [1, 2], 1, scale_shift=False, resblock_updown=False, groups=4, dropout=p, **COMMON),
    "dit": lambda p: DiT(2, 8, 2, width=16, depth=3, heads=2, **COMMON),
    "dit_qk_norm": lambda p: DiT(2, 8, 2, width=16, depth=2, heads=2, qk_norm=True, **COMMON),
    "ncsnpp": lambda p: ScoreUNet(2, 8, 8, [2, 1], 1, [4], fir=True, pyramid=True, fourier=True, dropout=p, **COMMON),
    "simple": lambda p: SimpleUNet(2, 8, 8, [1, 2], [1, 2], [4], 2, 16, dropout=p, groups=4, **COMMON),
    "vdm": lambda p: FlatUNet(2, 8, 8, 2, exponents=[0, 1], dropout=p, groups=4, **COMMON),
    "mine": lambda p: Mine(),
}
DROPOUT = ["unet", "ncsnpp", "simple", "vdm", "mine"]
SWITCHES = {
    "channels_last": {"channels_last": True},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "compile": {"compile": True},
    "compile+full": {"compile": True, "activation_checkpointing": "full"},
    "all": {"compile": True, "activation_checkpointing": "selective", "channels_last": True},
}
# tracing a whole U-Net takes seconds
CASES = [(name, switches) for name in NETWORKS for switches in ("channels_last", "full", "selective")]
CASES += [(name, "compile") for name in ("ddpm", "dit_qk_norm")]
CASES += [(name, switches) for name in ("dit", "mine") for switches in ("compile+full", "all")]


def build(name, dropout=0.0):
    """A network as after some training: no layer is zero any more."""
    torch.manual_seed(0)
    network = NETWORKS[name](dropout)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return network


def batch(n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(-15, 15, n, dtype=dtype), torch.arange(n) % 4


def output_and_gradients(network, *arguments):
    """x̂ and the gradient of every parameter of a loss, by name."""
    y = network(*arguments)
    (y.float() if y.dtype == torch.bfloat16 else y).square().mean().backward()
    return {"output": y.detach()} | {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture
def graphs(monkeypatch, request):
    """Compiles by a backend that needs no C++, by default one that differentiates too, and counts its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(getattr(request, "param", "aot_eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


class Operations(TorchDispatchMode):
    """Counts the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(function):
    with Operations() as mode:
        result = function()
    return result, mode.counts


# ------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(("name", "switches"), CASES)
def test_switches_keep_output_and_gradients(name, switches, graphs):
    # in float64, where rounding cannot hide a difference: 1e-9, and 1e-6 in float32 is then sure
    plain, fast = build(name).double(), build(name).double()
    if name == "mine":
        plain.layers[2].p = fast.layers[2].p = 0.0
    speed_up(fast, **SWITCHES[switches])
    arguments = batch(dtype=torch.float64)
    expected, actual = output_and_gradients(plain, *arguments), output_and_gradients(fast, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert (graphs.frame_count > 0) == ("compile" in SWITCHES[switches])
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(*arguments), expected["output"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DROPOUT)
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_drop_out_is_the_same(name, kind):
    plain, fast = build(name, dropout=0.3).double(), build(name, dropout=0.3).double()
    speed_up(fast, activation_checkpointing=kind)
    arguments = batch(dtype=torch.float64)
    torch.manual_seed(1)
    expected, after = output_and_gradients(plain, *arguments), torch.rand(())
    torch.manual_seed(1)
    torch.testing.assert_close(output_and_gradients(fast, *arguments), expected, rtol=1e-9, atol=1e-9)
    assert torch.rand(()) == after
    torch.manual_seed(2)
    assert not torch.allclose(plain(*arguments), expected["output"])


@pytest.mark.parametrize("switches", ["channels_last", "full", "selective"])
@pytest.mark.parametrize("name", ["unet", "dit", "dit_qk_norm", "ncsnpp", "simple"])
def test_bfloat16_stays_near(name, switches):
    # bfloat16 has 8 bits: the output within 3 % of its largest value, each gradient within 10 % in norm
    plain, fast = build(name), build(name)
    speed_up(fast, **SWITCHES[switches])
    expected = output_and_gradients(plain, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(fast, *batch())
    scale = expected["output"].abs().max().item()
    torch.testing.assert_close(actual["output"].float(), expected["output"], rtol=0, atol=0.03 * scale)
    whole = torch.cat([g.flatten() for k, g in expected.items() if k != "output"])
    error = torch.cat([(actual[k] - g).flatten() for k, g in expected.items() if k != "output"])
    assert error.norm() < 0.1 * whole.norm()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_keeps_output_and_gradients():
    torch._dynamo.reset()
    plain, fast = build("dit"), build("dit")
    speed_up(fast, compile=True)
    expected, actual = output_and_gradients(plain, *batch()), output_and_gradients(fast, *batch())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and flash attention need a GPU")
@pytest.mark.parametrize("compile", [True, "reduce-overhead"])
@pytest.mark.parametrize("name", ["unet", "dit", "dit_qk_norm"])
def test_on_a_gpu(name, compile):
    torch._dynamo.reset()
    plain, fast = build(name).cuda(), build(name).cuda()
    speed_up(fast, compile=compile, channels_last=True)
    arguments = [tensor.cuda() for tensor in batch()]
    expected = output_and_gradients(plain, *arguments)
    for _ in range(3):  # warming up, recording, replaying
        fast.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(output_and_gradients(fast, *arguments), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
@pytest.mark.parametrize(("depth", "kind"), [(12, "none"), (28, "none"), (12, "full"), (12, "selective")])
def test_blocks_of_a_transformer_share_one_graph(depth, kind, graphs):
    network = DiT(2, 8, 2, width=8, depth=depth, heads=2)
    speed_up(network, compile=True, activation_checkpointing=kind)
    x, logsnr, _ = batch()
    network(x, logsnr).mean().backward()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
@pytest.mark.parametrize("name", ["ddpm", "mine", "dit"])
def test_steps_evaluation_and_guidance_cost_one_graph_each(name, graphs):
    network = build(name, dropout=0.1)
    speed_up(network, compile=True)
    x, logsnr, label = batch()

    def step(k):
        network.train()(x + k, logsnr + k, (label + k) % 4).mean().backward()

    def evaluate(n, k):
        with torch.no_grad():
            network.eval()(x.repeat(n, 1, 1, 1) + k, logsnr.repeat(n) - k, label.repeat(n))

    step(0)
    assert graphs.frame_count == 1
    evaluate(1, 0)
    assert graphs.frame_count == 2
    evaluate(2, 0)  # guidance: as many again, told of no class
    assert graphs.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(1, 4):
            step(k)
            evaluate(1, k)
            evaluate(2, k)
    assert graphs.frame_count == 3


def test_an_average_shares_the_graphs_of_its_network(graphs):
    network = build("dit")
    average = copy.deepcopy(network)
    for each in (network, average):
        speed_up(each, compile=True)
        with torch.no_grad():
            each.eval()(*batch())
    assert graphs.frame_count == 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_cuda_graphs_are_of_the_whole_network(name, mode, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: calls.append((call.__self__, options)) or call)
    network = build(name)
    speed_up(network, compile=mode)
    assert calls == [(network, {"mode": mode, "dynamic": False})]


# -------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mine"])
def test_full_computes_all_again_and_selective_what_is_cheap(name):
    counts = {}
    for kind in ("none", "full", "selective"):
        network = build(name)
        speed_up(network, activation_checkpointing=kind)
        y, forward = operations(lambda network=network: network(*batch()))
        _, backward = operations(y.mean().backward)
        for what, wanted in {"heavy": ("mm", "addmm", "convolution"), "cheap": ("silu", "gelu")}.items():
            counts[kind, what] = sum(backward[operation] for operation in wanted)
            counts[kind, what, "forward"] = sum(forward[operation] for operation in wanted)
    assert counts["selective", "heavy"] == counts["none", "heavy"] < counts["full", "heavy"]
    assert counts["none", "cheap"] == 0 < counts["selective", "cheap"] == counts["full", "cheap"]
    assert counts["full", "heavy", "forward"] == counts["none", "heavy", "forward"]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_nothing_is_recomputed_in_evaluation(kind):
    plain, fast = build("unet").eval(), build("unet").eval()
    speed_up(fast, activation_checkpointing=kind)
    x, logsnr, label = batch()

    def differentiated(network):  # as for the score of a classifier
        return operations(lambda: network(x.clone().requires_grad_(), logsnr, label).sum().backward())[1]

    assert differentiated(fast) == differentiated(plain)


# -------------------------------------------------------------------------------------------------- in place, same keys


@pytest.mark.parametrize(("name", "compile"), [*((name, False) for name in NETWORKS), ("dit", True), ("mine", True)])
def test_weights_load_both_ways(name, compile, graphs):
    plain, fast = build(name), build(name)
    speed_up(fast, compile=compile, channels_last=True, activation_checkpointing="full")
    assert list(fast.state_dict()) == list(plain.state_dict())
    other = {key: value + 1 for key, value in plain.state_dict().items()}
    fast.load_state_dict(other)
    y = fast.double().eval()(*batch(dtype=torch.float64))
    torch.testing.assert_close(y, plain_with(name, other).double()(*batch(dtype=torch.float64)), rtol=1e-9, atol=1e-9)
    plain.load_state_dict(fast.state_dict())
    torch.testing.assert_close(dict(plain.state_dict()), other, rtol=0, atol=0)


def plain_with(name, state):
    network = build(name)
    network.load_state_dict(state)
    return network.eval()


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_copy_is_recomputed_with_its_own_weights(kind):
    network = build("unet")
    speed_up(network, activation_checkpointing=kind)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    torch.testing.assert_close(output_and_gradients(other, *batch()), output_and_gradients(build("unet"), *batch()))
    assert {id(part) for part in other.parts} <= {id(module) for module in other.modules()}


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_hold_nearly_all_weights(name):
    network = build(name)
    parts = network.parts or (network,)
    assert set(parts) <= set(network.modules())
    inside = [id(p) for part in parts for p in part.parameters()]
    assert len(inside) == len(set(inside))
    assert sum(p.numel() for part in parts for p in part.parameters()) > 0.5 * sum(
        p.numel() for p in network.parameters()
    )


@pytest.mark.parametrize("name", [name for name in NETWORKS if "dit" not in name])
def test_channels_last_reaches_every_convolution(name):
    network = build(name)
    speed_up(network, channels_last=True)
    strays = []

    def look(module, inputs, _):
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            strays.append(module)

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
        module.register_forward_hook(look)
    network(*batch())
    assert convolutions and strays == []


def test_channels_last_leaves_a_transformer_alone():
    network = build("dit")
    speed_up(network, channels_last=True)
    assert not network._forward_pre_hooks


def test_without_switches_nothing_changes():
    network = build("unet")
    before = dict(vars(network))
    speed_up(network)
    assert vars(network) == before
    assert all("forward" not in vars(module) for module in network.modules())


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"compile": "fast"}, "trainer.compile is fast; choose false, true, reduce-overhead or max-autotune"),
        (
            {"activation_checkpointing": "some"},
            "trainer.activation_checkpointing is some; choose none, full, selective",
        ),
    ],
)
def test_wrong_switches_are_refused(switches, words):
    network = build("unet")
    with pytest.raises(DiffxError, match=words):
        speed_up(network, channels_last=True, **switches)
    assert network.conv_in.weight.is_contiguous()


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_copies_nothing(qk_norm):
    """Queries, keys and values are views of one tensor, and so is the result."""
    attention = SelfAttention(16, 2, qk_norm)
    _, counts = operations(lambda: attention(torch.randn(2, 5, 16)))
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(counts), counts


def test_normalised_attention_follows_its_formula():
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, qk_norm=True).double()
    nn.init.normal_(attention.norm_q.weight)
    nn.init.normal_(attention.norm_k.weight)
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(tokens).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    q, k = (
        part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for part, norm in ((q, attention.norm_q), (k, attention.norm_k))
    )
    mixed = (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(attention(tokens), attention.out(mixed.transpose(1, 2).reshape(2, 5, 12)))


def test_normalised_attention_does_not_harden_as_its_weights_grow():
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, 8)

    def change(qk_norm):
        attention = SelfAttention(8, 2, qk_norm)
        before = attention(tokens)
        with torch.no_grad():
            attention.qkv.weight[:16] *= 100
            attention.qkv.bias[:16] *= 100
        return (attention(tokens) - before).abs().max()

    assert change(True) < 1e-3 < change(False)


def test_without_normalisation_attention_has_no_more_weights():
    assert set(SelfAttention(8, 2).state_dict()) == {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    assert set(SelfAttention(8, 2, True).state_dict()) - set(SelfAttention(8, 2).state_dict()) == {
        "norm_q.weight",
        "norm_k.weight",
    }
