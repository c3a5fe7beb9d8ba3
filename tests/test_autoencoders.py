"""Autoencoders: what they encode they decode, whoever computed the moments; and diffusers' own are the same here."""

import builtins
import itertools
import math

import pytest
import torch
from conftest import CONFIGS, build
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from test_cli import run

from diffx.autoencoders import KL, DiffusersKL, Pixels, fit_kl, psnr
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)


def images(n=6, channels=3, size=8, first=0):
    return (Keys(0, torch.arange(first, first + n)).uniform("images", channels, size, size) * 256).to(torch.uint8)


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return KL(3, **{"latent_channels": 2, "base": 8, "mult": (1, 2), "batch_size": 4, **settings}).eval()


@pytest.fixture
def published(tmp_path):
    """A tiny AutoencoderKL as diffusers saves it, with factors of its own."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.2,
    ).eval()
    network.save_pretrained(tmp_path / "vae")
    return network, str(tmp_path / "vae")


# ----- every autoencoder with a distribution


@pytest.fixture(params=["kl", "diffusers"])
def autoencoder(request):
    if request.param == "kl":
        made = small()
        made.shift.copy_(torch.tensor([0.3, -1.0]))
        made.scale.copy_(torch.tensor([2.0, 0.5]))
        return made
    return DiffusersKL.load(request.getfixturevalue("published")[1], batch_size=4)


def test_the_shape_of_latents_is_what_is_said(autoencoder):
    x = images()
    latent = autoencoder.encode({"x": x, "index": torch.arange(6)})
    assert latent.shape[1:] == autoencoder.latent_shape(3, 8) and latent.dtype == torch.float32
    again = autoencoder.decode(latent)
    assert again.shape == x.shape and again.dtype == torch.uint8
    with pytest.raises(DiffxError, match="takes images of 3 channels"):
        autoencoder.latent_shape(1, 8)
    with pytest.raises(DiffxError, match="a multiple of 2"):
        autoencoder.latent_shape(3, 9)


@pytest.mark.parametrize("choice", ["kl", "diffusers"])
def test_the_configs_load_weights(choice, tmp_path, request):
    if choice == "kl":
        small().save(tmp_path / "a.safetensors")
        weights = str(tmp_path / "a.safetensors")
    else:
        weights = request.getfixturevalue("published")[1]
    made = build("autoencoder", choice, weights=weights)
    assert made.latent_shape(3, 8)[1:] == (4, 4) and not made.training
    assert made.batch_size == {"kl": 64, "diffusers": 16}[choice]


def test_stored_moments_give_the_latents_of_the_images(autoencoder):
    x, index = images(), torch.arange(6) + 40
    direct = autoencoder.encode({"x": x, "index": index})
    moments = autoencoder.encoded(x)
    assert autoencoder.encode({"moments": moments, "index": index}).equal(direct)
    c = direct.shape[1]
    assert moments.shape[1] == 2 * c
    mean, logvar = moments.chunk(2, 1)
    eps = Keys(0, index).normal("posterior", *mean.shape[1:])
    z = mean + (logvar / 2).exp() * eps
    shift, scale = autoencoder.shift.view(-1, 1, 1), autoencoder.scale.view(-1, 1, 1)
    torch.testing.assert_close(direct, (z - shift) * scale)
    half = autoencoder.encode({"moments": moments.half(), "index": index})
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, direct, atol=2e-2, rtol=1e-2)


def test_the_draw_depends_on_the_sample_number_alone(autoencoder):
    x, index = images(), torch.arange(6)
    whole = autoencoder.encode({"x": x, "index": index})
    part = autoencoder.encode({"x": x[3:5], "index": index[3:5]})
    torch.testing.assert_close(part, whole[3:5])
    assert not autoencoder.encode({"x": x, "index": index + 6}).allclose(whole, atol=1e-3)
    moments = autoencoder.encoded(x)
    many = torch.stack([autoencoder.drawn(moments, index + 6 * k) for k in range(400)])
    mean, logvar = moments.chunk(2, 1)
    assert ((many.mean(0) - mean).abs() < 5 * (logvar / 2).exp() / math.sqrt(400)).all()
    torch.testing.assert_close(many.std(0), (logvar / 2).exp(), rtol=0.25, atol=0)
    # without sample numbers there is nothing to draw by: the mean
    torch.testing.assert_close(autoencoder.encode({"x": x}), autoencoder.scaled(mean))


def test_decoding_undoes_the_scale_and_does_not_depend_on_the_batch(autoencoder):
    z = torch.randn(6, *autoencoder.latent_shape(3, 8), generator=torch.Generator().manual_seed(0))
    decoded = autoencoder.decode(autoencoder.scaled(z))
    with torch.no_grad():
        expected = Pixels().decode(autoencoder.images(z))
    assert (decoded.int() - expected.int()).abs().max() <= 1
    autoencoder.batch_size = 1
    assert (autoencoder.decode(autoencoder.scaled(z)).int() - expected.int()).abs().max() <= 1


def test_training_in_half_precision_does_not_reach_the_autoencoder(autoencoder):
    x = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autoencoder.encoded(x).equal(autoencoder.encoded(x).float())
        inside = autoencoder.encoded(x)
    assert inside.equal(autoencoder.encoded(x))


def test_images_that_are_scaled_already_are_refused(autoencoder):
    with pytest.raises(DiffxError, match="as uint8"):
        autoencoder.encode({"x": images().float(), "index": torch.arange(6)})


def test_fingerprints_tell_weights_and_scales_apart(autoencoder):
    before = autoencoder.fingerprint()
    assert before == autoencoder.fingerprint() and len(before) == 32
    autoencoder.scale[0] += 0.1
    scaled = autoencoder.fingerprint()
    next(autoencoder.parameters()).data[0] += 1e-3
    assert len({before, scaled, autoencoder.fingerprint(), Pixels().fingerprint(), small(3).fingerprint()}) == 5


# ----- diffusers


def test_diffusers_weights_give_what_diffusers_gives(published):
    network, folder = published
    mine, x = DiffusersKL.load(folder, batch_size=2), images()
    with torch.no_grad():
        posterior = network.encode(x.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(mine.encode({"x": x}), (posterior.mode() - 0.2) * 0.7)
        noise = Keys(0, torch.arange(6)).normal("posterior", *posterior.mean.shape[1:])
        drawn = (posterior.mean + posterior.std * noise - 0.2) * 0.7
        torch.testing.assert_close(mine.encode({"x": x, "index": torch.arange(6)}), drawn)
        theirs = network.decode(drawn / 0.7 + 0.2).sample
    assert (mine.decode(drawn).int() - Pixels().decode(theirs).int()).abs().max() <= 1
    assert not any(p.requires_grad for p in mine.parameters())


def test_a_network_without_a_shift(published):
    network, _ = published
    network.register_to_config(shift_factor=None)
    assert DiffusersKL(network).shift.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("empty", "holds no AutoencoderKL of diffusers"),
        ("somebody/no-such-model", "are neither a folder nor in the cache of huggingface_hub"),
        ("/nowhere/at/all", "are neither a folder nor in the cache of huggingface_hub"),
    ],
)
def test_missing_diffusers_weights_are_one_sentence(tmp_path, monkeypatch, weights, said):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffxError) as error:
        DiffusersKL.load(weights)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_damaged_diffusers_weights_are_one_sentence(published, tmp_path):
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DiffxError, match="holds no AutoencoderKL") as error:
        DiffusersKL.load(str(tmp_path / "vae"))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(published, tmp_path):
    network, _ = published
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(DiffxError, match="as safetensors"):
        DiffusersKL.load(str(tmp_path / "pickled"))


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.startswith("diffusers"):
            raise ImportError("No module named 'diffusers'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DiffxError, match="pip install 'diffx\\[latents\\]'"):
        DiffusersKL.load("anything")


# ----- diffx's own


@pytest.mark.parametrize("mult", [(1,), (1, 2), (1, 1, 2, 2)])
def test_every_level_but_the_last_halves_the_size(mult):
    made = small(mult=mult)
    factor = 2 ** (len(mult) - 1)
    assert made.latent_shape(3, 16) == (2, 16 // factor, 16 // factor)
    assert made.encode({"x": images(size=16)}).shape == (6, 2, 16 // factor, 16 // factor)


@pytest.mark.parametrize("wrong", [{"base": 12}, {"mult": ()}, {"mult": (1, 0)}, {"latent_channels": 0}, {"blocks": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(DiffxError, match=r"a multiple of 8|at least 1"):
        small(**wrong)


def test_saving_and_loading(tmp_path):
    made = small()
    made.scale.fill_(3.0)
    made.about = {"psnr": 20.0}
    made.save(tmp_path / "a.safetensors")
    again = KL.load(str(tmp_path / "a.safetensors"), batch_size=2)
    assert again.fingerprint() == made.fingerprint() and again.settings == made.settings and again.about == made.about
    x = images()
    assert again.encode({"x": x, "index": torch.arange(6)}).equal(made.encode({"x": x, "index": torch.arange(6)}))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


@pytest.mark.parametrize("damage", ["absent", "cut", "other", "of another kind"])
def test_bad_files_are_one_sentence(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    small().save(path)
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other":
        path.write_bytes(b"something else")
    else:
        save_file({"a": torch.zeros(1)}, path, {"format": "another"})
    with pytest.raises(DiffxError) as error:
        KL.load(str(path))
    assert "diffx fit-autoencoder" in str(error.value) and "\n" not in str(error.value)


def stream(n=64, batch_size=8):
    """Images with few degrees of freedom: one of four patterns in a colour."""
    patterns = images(4)
    index = 0
    while True:
        numbers = torch.arange(index, index + batch_size)
        yield {
            "x": patterns[numbers % 4] // 2 + (numbers * 7 % 100).to(torch.uint8)[:, None, None, None],
            "index": numbers,
        }
        index += batch_size


def fitted(steps, seed=0, **settings):
    made = small(seed)
    held_out = next(iter(stream(batch_size=20)))["x"]
    rule = lambda p: torch.optim.AdamW(p, lr=3e-3)  # noqa: E731
    fit_kl(made, stream(), held_out, rule, lambda k: 1.0, max_steps=steps, scale_images=200, progress=False, **settings)
    return made, held_out


def test_fitting_lowers_the_error_and_sets_the_scale():
    before, held_out = fitted(1)
    after, _ = fitted(120)
    assert after.about["psnr"] > before.about["psnr"] + 5
    assert psnr(after, held_out) == after.about["psnr"]
    error = after.decode(after.encode({"x": held_out})).double() - held_out.double()
    assert after.about["psnr"] == pytest.approx(10 * math.log10(255**2 / error.square().mean().item()))
    batches = [next(b) for b in [stream()] for _ in range(40)]
    latents = torch.cat([after.encode(batch) for batch in batches])
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_fitting_repeats_and_its_losses_differ():
    one, two, other = fitted(5)[0], fitted(5)[0], fitted(5, loss="mse")[0]
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_a_heavy_kl_weight_makes_the_latent_a_standard_normal():
    made, held_out = fitted(150, kl_weight=100.0)
    mean, logvar = made.encoded(held_out).chunk(2, 1)
    assert mean.abs().mean() < 0.2 and logvar.abs().mean() < 0.2


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["autoencoder.base=8", "training.max_steps=3", "progress_bar=false", "data.batch_size=256"]
    code, out, _ = run(capsys, "fit-autoencoder", "data=digits", "out=kl.safetensors", *words)
    assert code == 0 and "PSNR" in out and "on 360 held-out images" in out and "4x4x4 numbers for 1x8x8" in out
    with safe_open("kl.safetensors", framework="pt") as file:
        assert "settings" in file.metadata()
    assert KL.load("kl.safetensors").about["data"] == "digits"
    for words, said in (
        (["out=kl.pt"], "must end in .safetensors"),
        (["training.loss=huber"], "training.loss must be l1 or mse"),
        (["autoencoder.mult=[1,2,2,2,2]"], "a multiple of 16"),
        (["training.max_steps=0"], "training.max_steps must be at least 1"),
    ):
        code, _, err = run(capsys, "fit-autoencoder", "data=digits", *words)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


# ---- pixels ----


def test_pixels_come_back_exactly():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pixels = Pixels()
    latent = pixels.encode({"x": x})
    assert latent.dtype == torch.float32 and latent.min() == -1 and latent.max() == 1
    assert latent[0, 0, 0, 1] == pytest.approx(1 / 127.5 - 1)
    assert torch.equal(pixels.decode(latent), x)
    assert torch.equal(pixels.decode(latent.double()), x)


def test_pixels_round_to_the_nearest_and_clamp():
    values = (torch.tensor([[[[99.4, 99.6, 200.0]]]]) / 127.5) - 1
    assert Pixels().decode(values).flatten().tolist() == [99, 100, 200]
    assert Pixels().decode(torch.tensor([[[[-7.0, -1.01, 1.01, 7.0]]]])).flatten().tolist() == [0, 0, 255, 255]


def test_pixels_refuse_images_that_are_scaled_already():
    with pytest.raises(DiffxError, match="must give them as uint8"):
        Pixels().encode({"x": torch.rand(1, 1, 2, 2)})


# those that need no weights
@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.glob("autoencoder/*.yaml")) if "???" not in path.read_text()],
    ids=lambda path: path.stem,
)
def test_autoencoder_configs_state_the_shape_of_their_latents(path):
    autoencoder = instantiate(OmegaConf.load(path))
    for channels, size in itertools.product((1, 3), (8, 32)):
        latent = autoencoder.encode({"x": torch.zeros(2, channels, size, size, dtype=torch.uint8)})
        assert latent.shape[1:] == autoencoder.latent_shape(channels, size)
        assert autoencoder.decode(latent).shape == (2, channels, size, size)
