"""Latent diffusion: encoded by any number of processes, read in the order of the images, decoded to be measured."""

import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from test_pack import files_below, picture, samples, sentence, tars

from diffx.autoencoders import KL
from diffx.cli import data_encode
from diffx.cli import main as cli
from diffx.cli.budget import set_steps
from diffx.cli.build import build, check
from diffx.cli.compose import compose_config
from diffx.cli.data_encode import _process
from diffx.cli.data_encoding import Encoding
from diffx.data import Latents, WebDataset
from diffx.data.pack import ArraySource, Interrupted, Layout, Manifest, PackSource, Transform, pack, splits_of
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)
N = 22


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def autoencoder(seed=0, channels=3):
    torch.manual_seed(seed)
    made = KL(channels, latent_channels=2, base=8, batch_size=8)
    made.shift.fill_(0.1)
    made.scale.fill_(2.0)
    return made.requires_grad_(False).eval()


@pytest.fixture
def shards(tmp_path):
    """22 images of 8 pixels in three classes, in shards of 5."""
    pixels = np.stack([np.asarray(picture(3 * i, (8, 8))) for i in range(N)])
    source = ArraySource("pictures", pixels, np.arange(N) % 3, ("a", "b", "c"))
    pack(source, tmp_path / "shards", Transform(), Layout(5))
    return tmp_path / "shards"


def encoding(source, dest, made=None, **changes):
    source = source if isinstance(source, PackSource) else splits_of(str(source))[""]
    layout = Layout(changes.pop("shard_size", 5))
    options = {"dtype": "float32", "flip": False, "batch_size": 4, "threads": 2, **changes}
    transform = options.pop("transform", Transform(channels=3))
    return Encoding(source, Path(dest), made or autoencoder(), transform, layout, **options)


def encode(source, dest, made=None, **changes):
    return encoding(source, dest, made, **changes)(torch.device("cpu"))


def latents(folder, **changes):
    settings = {"name": "latents", "num_classes": 3, "batch_size": 8, "flip": False, "num_workers": 0}
    shape = {"channels": 2, "image_size": 4, "decoded_channels": 3, "decoded_size": 8}
    return Latents(shards=str(folder), **{**settings, **shape, **changes})


def arrays(folder, part="npy"):
    return {key: np.load(io.BytesIO(parts[part])) for key, parts in samples(folder).items()}


def pixels_of(folder):
    """Images by key, uint8 `[N, C, H, W]`, with the keys in order."""
    found = {k: np.asarray(Image.open(io.BytesIO(p["png"]))).transpose(2, 0, 1) for k, p in samples(folder).items()}
    return list(found), torch.from_numpy(np.stack(list(found.values())))


# ----- encoding


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shards_become_shards_of_the_same_samples(shards, tmp_path, dtype):
    made = autoencoder()
    manifest = encode(shards, tmp_path / "out", made, dtype=dtype, flip=True)
    keys, x = pixels_of(shards)
    found, mirrored = arrays(tmp_path / "out"), arrays(tmp_path / "out", "flip.npy")
    assert list(found) == keys and [s.count for s in manifest.shards] == [5, 5, 5, 5, 2]
    tolerance = {"atol": 1e-5 if dtype == "float32" else 4e-3, "rtol": 1e-3}
    for stored, images in ((found, x), (mirrored, x.flip(-1))):
        numbers = torch.from_numpy(np.stack(list(stored.values())))
        assert str(numbers.numpy().dtype) == dtype and numbers.shape[1:] == (4, 4, 4)
        torch.testing.assert_close(numbers.float(), made.encoded(images), **tolerance)
    old, new = samples(shards), samples(tmp_path / "out")
    assert all(new[key]["cls"] == old[key]["cls"] for key in keys)
    assert (manifest.num_classes, manifest.class_names) == (3, ("a", "b", "c"))


def test_the_manifest_has_the_statistics_of_the_draws_and_the_autoencoder(shards, tmp_path):
    made = autoencoder()
    encode(shards, tmp_path / "out", made)
    said = Manifest.load(tmp_path / "out").latents
    moments = torch.from_numpy(np.stack(list(arrays(tmp_path / "out").values())))
    drawn = made.drawn(moments, torch.arange(N)).double()
    assert np.allclose(said["mean"], drawn.mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(said["std"], drawn.std((0, 2, 3), correction=0), atol=1e-12)
    assert said["shape"] == [2, 4, 4] and said["image"] == [3, 8, 8] and said["dtype"] == "float32"
    told = {"class": "KL", "fingerprint": made.fingerprint(), "scale": [2.0, 2.0]}
    assert told.items() <= said["autoencoder"].items()


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_share_the_shards_and_the_last_one_finishes(shards, tmp_path, world_size):
    alone = encode(shards, tmp_path / "alone")
    results = []
    for rank in reversed(range(world_size)):
        part = encoding(shards, tmp_path / "shared")
        results.append(part(torch.device("cpu"), rank, world_size))
        if rank:
            assert not (tmp_path / "shared/manifest.json").exists() and not tars(tmp_path / "shared")
    assert results[:-1] == [None] * (world_size - 1)
    assert results[-1] == alone
    assert tars(tmp_path / "shared") == tars(tmp_path / "alone")
    assert files_below(tmp_path / "shared") == files_below(tmp_path / "alone")
    # a rank that comes late finds all done
    assert encoding(shards, tmp_path / "shared")(torch.device("cpu"), 1, world_size) == alone


def test_two_ranks_that_finish_at_the_same_time_do_no_harm(shards, tmp_path):
    alone = encode(shards, tmp_path / "alone")
    one, two = encoding(shards, tmp_path / "shared"), encoding(shards, tmp_path / "shared")
    finish = two.staging.finish

    def late(manifest):
        assert one._finished() == alone
        finish(manifest)

    two.staging.finish = late
    assert two(torch.device("cpu")) == alone
    assert tars(tmp_path / "shared") == tars(tmp_path / "alone")
    assert one._finished() == alone


def test_stopping_and_going_on_gives_the_same_bytes(shards, tmp_path):
    encode(shards, tmp_path / "whole")
    for after in (2, 11):
        asked = iter([False] * after + [True] * 99)
        part = encoding(shards, tmp_path / f"{after}")
        with pytest.raises(Interrupted, match=f"stopped with {after // 5} of 5 shards finished"):
            part(torch.device("cpu"), stop=lambda asked=asked: next(asked))
        encode(shards, tmp_path / f"{after}")
        assert tars(tmp_path / f"{after}") == tars(tmp_path / "whole")


def test_other_autoencoders_and_settings_are_refused_on_resuming(shards, tmp_path):
    encode(shards, tmp_path / "out")
    for changes in ({"made": autoencoder(1)}, {"dtype": "float16"}, {"flip": True}):
        with pytest.raises(DiffxError) as error:
            encode(shards, tmp_path / "out", **changes)
        assert "is of other settings" in sentence(error)


def test_a_folder_of_photos_is_cropped_and_cut_into_shards(tmp_path):
    for i in range(7):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(i, (20, 16 + i)).save(tmp_path / f"photos/{i}.jpg")
    manifest = encode(tmp_path / "photos", tmp_path / "out", transform=Transform(8, 3), shard_size=3)
    assert [shard.count for shard in manifest.shards] == [3, 3, 1] and manifest.num_classes == 0
    with pytest.raises(DiffxError, match="image_size=N to scale and crop"):
        encode(tmp_path / "photos", tmp_path / "no")
    for i in range(7):
        picture(i, (8 + 2 * (i > 3), 8 + 2 * (i > 3))).save(tmp_path / f"photos/{i}.jpg")
    with pytest.raises(DiffxError, match="and the first image is 3x8x8; set image_size=N"):
        encode(tmp_path / "photos", tmp_path / "mixed")
    assert not (tmp_path / "mixed/manifest.json").exists()


def test_moments_that_overflow_are_refused_by_name(shards, tmp_path):
    made = autoencoder()
    made.encoder[-1].bias.fill_(1e5)
    with pytest.raises(DiffxError, match=r"latent of '.*000000.tar: \d+' is not finite as float16; set dtype=float32"):
        encode(shards, tmp_path / "out", made, dtype="float16")
    assert encode(shards, tmp_path / "out2", made).count == N


def test_which_process_this_is(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    nothing = {"rank": None, "world_size": None, "devices": 1}
    assert _process(nothing) == (0, 1)
    assert _process(nothing | {"rank": 2, "world_size": 3}) == (2, 3)
    for wrong in ({"rank": 1}, {"world_size": 2}, {"rank": 2, "world_size": 2}):
        with pytest.raises(DiffxError, match="do not go together"):
            _process(nothing | wrong)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert _process(nothing) == (0, 1)  # a batch script, not yet srun
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert _process(nothing) == (5, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert _process(nothing) == (3, 4)


# ----- reading


def first_batches(source, steps=6, rank=0, world_size=1, start_step=0, seed=3):
    loader = iter(source.train_loader(seed, start_step, rank, world_size))
    return [next(loader) for _ in range(steps)]


def test_latents_come_in_the_order_of_the_images(shards, tmp_path):
    made = autoencoder()
    encode(shards, tmp_path / "out", made)
    settings = {"name": "w", "channels": 3, "image_size": 8, "num_classes": 3, "batch_size": 8, "flip": False}
    for window in (0, 2):
        images = WebDataset(shards=str(shards), test_fraction=0.0, num_workers=0, shuffle_shards=window, **settings)
        source = latents(tmp_path / "out", shuffle_shards=window)
        source.check()
        for image, latent in zip(first_batches(images), first_batches(source), strict=True):
            assert set(latent) == {"moments", "label", "index"} and latent["moments"].dtype == torch.float32
            assert latent["label"].equal(image["label"]) and latent["index"].equal(image["index"])
            torch.testing.assert_close(made.encode(latent), made.encode(image), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_is_the_same_for_any_ranks_workers_and_restarts(shards, tmp_path, num_workers):
    encode(shards, tmp_path / "out", dtype="float16", flip=True)
    whole = first_batches(latents(tmp_path / "out", flip=True))
    source = latents(tmp_path / "out", flip=True, num_workers=num_workers)
    for start in (0, 4):
        parts = [first_batches(source, 6 - start, rank, 2, start) for rank in range(2)]
        for expected, *chunks in zip(whole[start:], *parts, strict=True):
            for name, value in expected.items():
                assert torch.cat([chunk[name] for chunk in chunks]).equal(value)


def test_the_keyed_flip_chooses_the_copy(shards, tmp_path):
    encode(shards, tmp_path / "out", flip=True)
    plain, mirrored = arrays(tmp_path / "out"), arrays(tmp_path / "out", "flip.npy")
    known = {a.tobytes(): False for a in plain.values()} | {a.tobytes(): True for a in mirrored.values()}
    for batch in first_batches(latents(tmp_path / "out", flip=True)):
        found = [known[m.numpy().tobytes()] for m in batch["moments"]]
        assert found == (Keys(3, batch["index"]).uniform("flip") < 0.5).tolist()
    assert not any(known[m.numpy().tobytes()] for b in first_batches(latents(tmp_path / "out")) for m in b["moments"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 4}, r"data.channels is 4, but .* has 2; set data.channels=2"),
        ({"image_size": 8}, "set data.image_size=4"),
        ({"decoded_channels": 1}, "set data.decoded_channels=3"),
        ({"decoded_size": 32}, "set data.decoded_size=8"),
        ({"num_classes": 10}, "set data.num_classes=3"),
        ({"flip": True}, "encode them with flip=true, or set data.flip=false"),
        ({"shards": "nowhere"}, "there is no folder 'nowhere'"),
        ({"images": "nowhere"}, "there is no shard 'nowhere'"),
    ],
)
def test_settings_that_do_not_fit_the_latents(shards, tmp_path, changes, said):
    encode(shards, tmp_path / "out")
    folder = changes.pop("shards", tmp_path / "out")
    with pytest.raises(DiffxError, match=said) as error:
        latents(folder, **changes).check()
    sentence(error)


def test_images_are_no_latents_and_no_labels_are_no_classes(shards, tmp_path):
    with pytest.raises(DiffxError, match="holds images, no latents; encode them first"):
        latents(shards).check()
    encode(shards, tmp_path / "out")
    unlabelled = latents(tmp_path / "out", num_classes=0)
    unlabelled.check()
    assert not first_batches(unlabelled, 1)[0]["label"].any()


@pytest.mark.parametrize("damage", ["missing", "shorter", "manifest"])
def test_damaged_shards_are_found_before_training(shards, tmp_path, damage):
    encode(shards, tmp_path / "out")
    path = tmp_path / "out/000002.tar"
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-10240])
    else:
        (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(DiffxError) as error:
        latents(tmp_path / "out").check()
    sentence(error)


def test_the_images_to_compare_with(shards, tmp_path):
    encode(shards, tmp_path / "out")
    with_images = latents(tmp_path / "out", images=str(shards))
    with_images.check()
    train = with_images.split("train")
    assert len(train) == N and train.get(torch.tensor([0]))["x"].shape == (1, 3, 8, 8)
    with pytest.raises(DiffxError):
        with_images.split("test")
    none = latents(tmp_path / "out")
    assert len(none.split("train")) == 0
    for ask in (lambda: none.split("test"), none.split("train").fingerprint):
        with pytest.raises(DiffxError, match=r"set data.images to the folder"):
            ask()
    (tmp_path / "both").mkdir()
    for name in ("train", "test"):
        (tmp_path / "both" / name).symlink_to(shards)
    both = latents(tmp_path / "out", images=str(tmp_path / "both"))
    assert len(both.split("test")) == len(both.split("train")) == N


# ----- the whole way


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits packed and encoded by the command line, with the words that train on them."""
    root = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    made = KL(1, latent_channels=2, base=8)
    made.save(root / "kl.safetensors")
    weights = f"autoencoder.weights={root}/kl.safetensors"
    for words in (
        ["pack", f"{root}/images", "data=digits", "shard_size=400", "workers=2"],
        ["encode", f"{root}/images", f"{root}/latents", "autoencoder=kl", weights, "flip=true"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", *words])
        assert stop.value.code == 0
    train = [
        "data=latents",
        f"data.shards={root}/latents/train",
        "data.channels=2",
        "data.image_size=4",
        "data.decoded_channels=1",
        "data.decoded_size=8",
        "data.num_classes=10",
        "data.batch_size=16",
        "data.num_workers=0",
        "data.flip=true",
        "autoencoder=kl",
        weights,
        "thresholding=none",
        "backbone=unet_tiny",
        "training.max_steps=3",
        "evaluation.every_n_steps=0",
        "evaluation.num_samples=80",
        "evaluation.per_class=2",
        "sampler.steps=2",
        "trainer=cpu",
        "progress_bar=false",
        f"runs_dir={root}/runs",
    ]
    return root, train


def test_training_sampling_and_measuring_latents(digits, tmp_path, capsys):
    root, train = digits
    images = f"data.images={root}/images"
    code, out, err = run(capsys, "train", *train, images, "metrics=[fd,is,consistency]")
    assert code == 0, err
    assert "1,437 latents of 2×4×4 numbers, of images of 1×8×8 pixels" in out and "fd_digits" in out
    (run_dir,) = root.glob("runs/digits/*/seed0")
    (record,) = run_dir.glob("evaluations/*.json")
    said = json.loads(record.read_text())
    assert said["protocol"]["reference"]["images"] == 360
    assert {"fd_digits", "fd_digits_floor"} <= set(said["values"])
    code, out, _ = run(capsys, "sample", f"run={run_dir}", "n=6", f"out={tmp_path}/x.npz")
    assert code == 0
    made = np.load(tmp_path / "x.npz")["arr_0"]
    assert made.shape == (6, 8, 8, 1) and made.dtype == np.uint8
    # statistics in a file do instead of the images, and say the same of the same samples
    code, _, err = run(
        capsys, "reference", "data=digits", "extractor=digits", "evaluation.reference=test", f"out={tmp_path}/d.npz"
    )
    assert code == 0, err
    code, _, err = run(capsys, "evaluate", f"run={run_dir}", f"evaluation.reference={tmp_path}/d.npz", "metrics=[fd]")
    assert code == 0, err
    other = next(json.loads(p.read_text()) for p in run_dir.glob("evaluations/*.json") if p != record)
    assert other["values"]["fd_digits"]["value"] == pytest.approx(said["values"]["fd_digits"]["value"], rel=1e-6)


def arm_of(train, *changes):
    changed = {word.partition("=")[0]: word for word in changes}
    words = [word for word in train if word.partition("=")[0] not in changed]
    return build(compose_config("train", [*words, *changes], [], set_steps))


def test_training_without_images_needs_a_reference(digits):
    _, train = digits
    with pytest.raises(DiffxError, match="data=latents has no images to compare samples with"):
        check(arm_of(train))
    check(arm_of(train, "evaluation.num_samples=0", "evaluation.interim_samples=0"))


def test_another_autoencoder_is_refused_in_one_sentence(digits, tmp_path):
    _, train = digits
    torch.manual_seed(5)
    KL(1, latent_channels=2, base=8).save(tmp_path / "other.safetensors")
    with pytest.raises(DiffxError) as error:
        arm_of(train, f"autoencoder.weights={tmp_path}/other.safetensors")
    assert "were encoded by another autoencoder" in sentence(error) and "diffx data encode" in str(error.value)


def test_what_does_not_go_with_latents_is_refused(digits):
    root, train = digits
    with pytest.raises(DiffxError, match="set thresholding=none"):
        check(arm_of(train, "thresholding=static"))
    check(
        arm_of(train, "thresholding=static", "thresholding.low=-6", "thresholding.high=6", f"data.images={root}/images")
    )
    with pytest.raises(DiffxError, match=r"backbone.in_channels is 3, and latents have 2x4x4 numbers"):
        check(arm_of(train, "backbone.in_channels=3"))


def test_encoding_while_training_gives_the_same_latents(digits):
    """An autoencoder in front of images needs a backbone of its latents' shape, and nothing else."""
    _, train = digits
    weights = next(word for word in train if word.startswith("autoencoder.weights"))
    words = ["data=digits", "autoencoder=kl", weights, "thresholding=none", "trainer=cpu", "backbone=unet_tiny"]
    with pytest.raises(DiffxError, match=r"set backbone.in_channels=2 backbone.image_size=4"):
        check(arm_of(words))
    arm = arm_of(words, "backbone.in_channels=2", "backbone.image_size=4")
    check(arm)
    batch = next(iter(arm.source.train_loader(0)))
    assert arm.module.training_step(batch, 0)["loss"].isfinite()


def test_ranks_at_the_same_time(shards, tmp_path):
    alone = encode(shards, tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    jobs = [encoding(shards, tmp_path / "shared") for _ in range(3)]
    ranks = [context.Process(target=job, args=(torch.device("cpu"), k, 3)) for k, job in enumerate(jobs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert Manifest.load(tmp_path / "shared") == alone
    assert files_below(tmp_path / "shared") == files_below(tmp_path / "alone")


def test_several_processes_are_started_with_the_same_words(digits, tmp_path, monkeypatch):
    root, train = digits
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    weights = next(word for word in train if word.startswith("autoencoder.weights"))
    words = [f"{root}/images/train", f"{tmp_path}/out", "autoencoder=kl", weights, "devices=2"]
    started = []
    monkeypatch.setattr(data_encode, "launch", lambda *arguments: started.append(arguments) or 0)
    assert data_encode.main(words) == 0
    assert started == [(["-m", "diffx.cli.main", "data", "encode", *words], 2)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{root}/images/train", "out"], "say by what"),
        (["{root}/images/train", "autoencoder=kl", "{weights}"], "say what and where to"),
        (["nowhere", "out", "autoencoder=kl", "{weights}"], "there is no folder or file 'nowhere'"),
        (["{root}/images/train", "out", "autoencoder=pixels"], "has no latents to store"),
        (["{root}/images/train", "out", "autoencoder=kl"], "autoencoder.weights has no default"),
        (["{root}/images/train", "out", "autoencoder=kl", "autoencoder.weights=no"], "there is no autoencoder at 'no'"),
        (
            ["{root}/images/train", "out", "autoencoder=kl", "{weights}", "dtype=int8"],
            "dtype must be float16 or float32",
        ),
        (["{root}/images/train", "out", "autoencoder=kl", "{weights}", "rank=1"], "rank=1 world_size=None do not go"),
        (["{root}/images/train", "out", "autoencoder=kl", "{weights}", "image_size=7"], "a multiple of 2"),
        (["out", "data=digits", "autoencoder=kl", "{weights}", "shard_size=1MB"], "set shard_size to a number"),
    ],
)
def test_mistakes_on_the_command_line(digits, tmp_path, monkeypatch, capsys, words, said):
    root, train = digits
    weights = next(word for word in train if word.startswith("autoencoder.weights"))
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "data", "encode", *(word.format(root=root, weights=weights) for word in words))
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_inspecting_latents(digits, tmp_path, capsys):
    root, _ = digits
    code, out, _ = run(capsys, "data", "inspect", f"{root}/latents/test", f"out={tmp_path}/x.png", "checksums=true")
    assert code == 0, out
    assert "360 samples, 10 classes" in out and "latents     2x4x4, drawn: mean" in out and "4x4 (360)" in out
    assert (tmp_path / "x.png").is_file()
