"""Data sets are what their files say, in an order that depends on seed and epoch alone; bad files are named."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from diffx.data import (
    CIFAR10,
    MNIST,
    DataSource,
    Digits,
    FashionMNIST,
    FileImages,
    Folder,
    Found,
    GlobalBatches,
    Images,
    MapSource,
    Stream,
    TensorImages,
)
from diffx.data.decode import read_image
from diffx.data.held_out import held_out
from diffx.data.idx import read_idx
from diffx.utils import DiffxError, Keys

CONFIGS = Path(__file__).parents[1] / "configs"
N = 37
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class FromAfar(Images):
    """Images that are not in memory, as far as the loader knows."""

    def __init__(self, images):
        self.images = images

    in_memory = False

    def __len__(self):
        return len(self.images)

    def get(self, indices):
        return self.images.get(indices)

    def fingerprint(self):
        return self.images.fingerprint()


class Synthetic(MapSource):
    """Image i has all pixels i, but for a corner that shows whether it is mirrored."""

    class_names = ("a", "b", "c")

    def prepare(self):
        pass

    def inspect(self):
        return Found("the synthetic set", 1, 2, 2, 3, N, N)

    def load(self, name):
        x = torch.arange(N, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
        x[..., 0] = 255
        return FromAfar(TensorImages(x, torch.arange(N) % 3))


def settings(**changes):
    plain = {"name": "synthetic", "channels": 1, "image_size": 2, "num_classes": 3}
    return {**plain, "batch_size": 8, "flip": True, "num_workers": 0, **changes}


def folder(root, **changes):
    return Folder(root=str(root), **settings(**{"name": "folder", "image_size": 4, "num_classes": 0, **changes}))


def global_batches(source, steps, world_size=1, accumulate=1, start_step=0):
    """The global batches of some steps, put together from the chunks of all ranks."""
    loaders = [iter(source.train_loader(5, start_step, rank, world_size, accumulate)) for rank in range(world_size)]
    batches = []
    for _ in range(steps):
        chunks = [next(loader) for _ in range(accumulate) for loader in loaders]
        batches.append({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
    return batches


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"x", "label", "index"}
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


# the stream


@pytest.mark.parametrize("batch_size", [8, N, 100])
def test_every_image_once_per_pass_in_another_order_each_time(batch_size):
    batches = global_batches(Synthetic(**settings(batch_size=batch_size)), 3 * N)
    x = torch.cat([batch["x"] for batch in batches])[: 3 * N]
    image = x.amin(dim=(1, 2, 3)).to(torch.int64)
    passes = image.reshape(3, N)
    for one in passes:
        assert one.sort().values.tolist() == list(range(N))
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])
    assert torch.equal(torch.cat([batch["label"] for batch in batches])[: 3 * N], image % 3)
    index = torch.cat([batch["index"] for batch in batches])
    assert torch.equal(index, torch.arange(len(index)))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (1, 1)])
def test_the_stream_is_the_same_for_any_ranks_accumulation_and_workers(world_size, accumulate, num_workers):
    expected = global_batches(Synthetic(**settings()), 6)
    source = Synthetic(**settings(num_workers=num_workers))
    assert_same(global_batches(source, 6, world_size, accumulate), expected)


def test_a_restart_continues_the_stream():
    source = Synthetic(**settings())
    whole = global_batches(source, 12)
    for start in (1, 5, 11):
        assert_same(global_batches(source, 12 - start, start_step=start), whole[start:])


def test_batches_in_any_order_and_as_lists_are_the_same():
    images = Synthetic(**settings()).split("train")
    ranges = [range(8 * k, 8 * k + 8) for k in range(20)]
    forward, backward = Stream(images, 5, True), Stream(images, 5, True)
    expected = [forward.__getitems__(samples) for samples in ranges]
    assert_same([backward.__getitems__(list(samples)) for samples in reversed(ranges)][::-1], expected)
    assert_same([{name: value[None] for name, value in forward[9].items()}], [forward.__getitems__([9])])


def test_flips_depend_on_seed_and_sample_number_only():
    images = Synthetic(**settings()).split("train")
    n = range(2000)
    plain, flipped = Stream(images, 5), Stream(images, 5, flip=True)
    x, y = plain.__getitems__(n)["x"], flipped.__getitems__(n)["x"]
    mirrored = Keys(5, torch.arange(2000)).uniform("flip") < 0.5
    assert torch.equal(y[mirrored], x[mirrored].flip(-1)) and torch.equal(y[~mirrored], x[~mirrored])
    assert 0.46 < mirrored.float().mean() < 0.54
    first, second = mirrored[:N], mirrored[N : 2 * N]
    assert not torch.equal(first, second)
    assert not torch.equal(Stream(images, 6, flip=True).__getitems__(n)["x"], y)


def test_flips_leave_the_data_set_alone():
    source = Digits(**settings(name="digits", image_size=8, num_classes=10))
    images = source.split("train")
    before = images.fingerprint(), images.get(torch.arange(len(images)))["x"].clone()
    loader = iter(source.train_loader(0))
    for _ in range(50):
        next(loader)
    assert torch.equal(images.get(torch.arange(len(images)))["x"], before[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_stream_leaves_the_global_generator_alone(num_workers):
    before = torch.get_rng_state()
    next(iter(Synthetic(**settings(num_workers=num_workers)).train_loader(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_in_memory_take_no_workers():
    source = Digits(**settings(name="digits", image_size=8, num_classes=10, num_workers=3))
    assert source.train_loader(0).num_workers == 0
    assert Synthetic(**settings(num_workers=3)).train_loader(0).num_workers == 3


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "remedy"),
    [(100, 3, 1, "99 or 102"), (64, 4, 3, "60 or 72"), (2, 4, 1, "data.batch_size=4")],
)
def test_a_batch_that_does_not_divide_is_refused(batch_size, world_size, accumulate, remedy):
    with pytest.raises(DiffxError, match=remedy) as error:
        GlobalBatches(batch_size, world_size=world_size, accumulate=accumulate)
    for part in (f"data.batch_size={batch_size}", f"{world_size} processes", f"{accumulate} accumulated"):
        assert part in str(error.value)


# sources in general


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("data/*.yaml")), ids=lambda path: path.stem)
def test_configs_build_sources(path, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFX_DATA", str(tmp_path))
    source = instantiate(OmegaConf.load(path))
    assert isinstance(source, DataSource)
    assert source.name == path.stem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [("channels", 3, 1), ("image_size", 32, 2), ("num_classes", 10, 3), ("num_classes", 0, 3)],
)
def test_settings_must_be_what_is_found(key, wrong, right):
    source = Synthetic(**settings(**{key: wrong}))
    for act in (source.check, lambda: source.split("train"), lambda: source.train_loader(0)):
        with pytest.raises(DiffxError, match=rf"data.{key} is {wrong}, .* has {right}; set data.{key}={right}"):
            act()


@pytest.mark.parametrize("key", ["channels", "image_size", "batch_size", "num_classes", "num_workers"])
def test_impossible_numbers_are_refused(key):
    for value in (-1, 2.5):
        with pytest.raises(DiffxError, match=f"data.{key} is {value}"):
            Synthetic(**settings(**{key: value}))


def test_split_names_are_checked():
    with pytest.raises(DiffxError, match="did you mean 'train'"):
        Synthetic(**settings()).split("trian")  # pyright: ignore


def test_fingerprints_follow_pixels_labels_and_shape():
    x, label = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    same = TensorImages(x, label).fingerprint()
    assert same == TensorImages(x.clone(), label.clone()).fingerprint()
    pixel, other = x.clone(), label.clone()
    pixel[3, 0, 1, 1] = 1
    other[3] = 1
    changed = [TensorImages(pixel, label), TensorImages(x, other), TensorImages(x.reshape(4, 2, 1, 2), label)]
    assert len({same, *(images.fingerprint() for images in changed)}) == 4


@pytest.mark.parametrize(
    ("x", "label"),
    [
        (torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4)),
    ],
)
def test_tensor_images_refuse_other_types_and_shapes(x, label):
    with pytest.raises(ValueError, match="must be"):
        TensorImages(x, label)


# digits and held-out splits


def test_digits_are_split_once_and_for_all():
    source = Digits(**settings(name="digits", image_size=8, num_classes=10))
    train, test = source.split("train"), source.split("test")
    assert (len(train), len(test)) == (1437, 360)
    # changing the split would change every number published on it
    assert train.fingerprint() == "1d863784653a6287e7cbe3e62b062bc8"
    assert test.fingerprint() == "fc7b373c0c03cd1fdddfb3f05d00d4f4"
    sample = test[3]
    assert sample["x"].dtype == torch.uint8 and sample["x"].shape == (1, 8, 8)
    counts = [images.get(torch.arange(len(images)))["label"].bincount() for images in (train, test)]
    share = counts[1] / (counts[0] + counts[1])
    assert (share - 360 / 1797).abs().max() < 1 / 150
    assert source.split("train") is train
    assert source.describe().startswith("digits: 1,437 train and 360 test images of 1×8×8 pixels, 10 classes")


def test_digits_fill_the_range_of_bytes():
    from sklearn.datasets import load_digits

    source = Digits(**settings(name="digits", image_size=8, num_classes=10))
    x = [source.split(name).get(torch.arange(n))["x"] for name, n in (("train", 1437), ("test", 360))]
    values = torch.cat(x).unique().tolist()
    assert values == [int(v * 255 / 16 + 0.5) for v in range(17)]
    # together the splits are the published set
    published = sorted(tuple(int(v * 255 / 16 + 0.5) for v in image) for image in load_digits().data)
    assert sorted(tuple(image.flatten().tolist()) for image in torch.cat(x)) == published


def test_held_out_sets_are_stratified_of_exact_size_and_stable():
    labels = torch.tensor([0] * 50 + [1] * 33 + [2] * 17)
    identity = torch.arange(100) * 7919
    out = held_out(labels, identity, 20)
    assert out.sum() == 20
    assert labels[out].bincount().tolist() == [10, 7, 3]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(held_out(labels[order], identity[order], 20), out[order])
    assert held_out(labels, identity, 0).sum() == 0 and held_out(labels, identity, 100).all()
    # one image more moves at most the one whose place it takes
    more = held_out(torch.cat([labels, labels[:1]]), torch.cat([identity, torch.tensor([-5])]), 20)
    assert (more[:100] != out).sum() <= 2


# idx files


def write_idx(path, array, cut=0):
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    content = gzip.compress(content) if path.suffix == ".gz" else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content[: len(content) - cut])


def write_set(folder, suffix=".gz", size=(28, 28), label=9):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, *size)).astype(np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.full(count, label, np.uint8))


def idx_source(root, kind=FashionMNIST, name="fashion_mnist", download=False, **changes):
    numbers = settings(name=name, image_size=28, num_classes=10, **changes)
    return kind(root=str(root), download=download, **numbers)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 6)])
def test_idx_round_trip(tmp_path, suffix, shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / f"a-idx-ubyte{suffix}"
    write_idx(path, array)
    assert np.array_equal(read_idx(path), array)
    assert read_idx(path).flags.writeable


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("cut", [1, 5, 100, 10**6])
def test_truncated_idx_files_are_refused_by_name(tmp_path, suffix, cut):
    path = tmp_path / f"a-idx-ubyte{suffix}"
    array = np.random.default_rng(0).integers(0, 256, (10, 10)).astype(np.uint8)
    write_idx(path, array)
    write_idx(path, array, cut=min(cut, path.stat().st_size))
    with pytest.raises(DiffxError, match=path.name):
        read_idx(path)


def test_foreign_and_overlong_and_corrupt_idx_files_are_refused(tmp_path):
    path, zipped = tmp_path / "a", tmp_path / "a.gz"
    path.write_bytes(b"\x89PNG\r\n" + bytes(50))
    zipped.write_bytes(b"no gzip at all")
    for bad in (path, zipped, tmp_path / "absent"):
        with pytest.raises(DiffxError, match=f"'{bad}' is missing, truncated or no idx file"):
            read_idx(bad)
    write_idx(path, np.zeros((2, 2), np.uint8))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DiffxError, match="holds 5 bytes where its header states 4"):
        read_idx(path)
    write_idx(zipped, np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8))
    content = zipped.read_bytes()
    # a wrong byte breaks the check sum; in the head of a block it breaks the block
    for at in (500, 10):
        zipped.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        with pytest.raises(DiffxError, match=r"a.gz"):
            read_idx(zipped)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", [".", "fashion_mnist", "FashionMNIST/raw"])
def test_idx_sets_are_read_from_local_folders(tmp_path, below, suffix):
    write_set(tmp_path / below, suffix)
    source = idx_source(tmp_path, download=True)
    source.prepare()
    source.check()
    assert "12 train and 5 test images of 1×28×28" in source.describe()
    batch = source.split("train").get(torch.tensor([11, 0]))
    raw = read_idx(tmp_path / below / f"train-images-idx3-ubyte{suffix}")
    assert np.array_equal(batch["x"][:, 0].numpy(), raw[[11, 0]])
    assert batch["label"].tolist() == [9, 9]
    assert len(source.split("test")) == 5
    assert source.class_names[9] == "Ankle boot"


def test_idx_sets_that_are_not_there_are_refused_with_the_remedy(tmp_path):
    source = idx_source(tmp_path)
    source.prepare()
    for act in (source.check, lambda: source.split("train")):
        with pytest.raises(DiffxError, match=r"data.root .* data.download=true"):
            act()
    waiting = idx_source(tmp_path, download=True)
    waiting.check()
    with pytest.raises(DiffxError, match="are not in"):
        waiting.split("train")


def test_a_missing_file_of_an_idx_set_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DiffxError, match=r"lacks t10k-labels-idx1-ubyte.gz"):
        idx_source(tmp_path).check()


def test_idx_sets_of_another_shape_or_kind_are_refused(tmp_path):
    write_set(tmp_path / "small", size=(20, 20))
    with pytest.raises(DiffxError, match=r"data.image_size is 28, .* has 20; set data.image_size=20"):
        idx_source(tmp_path / "small").check()
    write_set(tmp_path / "oblong", size=(20, 28))
    with pytest.raises(DiffxError, match="20×28 pixels, and only square"):
        idx_source(tmp_path / "oblong").check()
    write_set(tmp_path / "letters", label=25)
    with pytest.raises(DiffxError, match="has label 25"):
        idx_source(tmp_path / "letters").split("train")
    write_set(tmp_path / "mixed")
    write_idx(tmp_path / "mixed" / "train-labels-idx1-ubyte.gz", np.zeros(7, np.uint8))
    with pytest.raises(DiffxError, match="not N images with N labels"):
        idx_source(tmp_path / "mixed").check()


@pytest.mark.parametrize(("kind", "name"), [(FashionMNIST, "fashion_mnist"), (MNIST, "mnist")])
def test_downloads_are_whole_or_absent(tmp_path, monkeypatch, kind, name):
    published = getattr(torchvision.datasets, kind.__name__)

    def broken(self):
        write_set(Path(self.raw_folder))
        raise RuntimeError("no route to host")

    def slow(self):
        write_set(tmp_path / published.__name__ / "raw", suffix="")
        working(self)

    def working(self):
        write_set(Path(self.raw_folder), suffix="")

    source = idx_source(tmp_path, kind, name, download=True)
    monkeypatch.setattr(published, "download", broken)
    with pytest.raises(DiffxError, match=r"cannot be downloaded .*no route to host.* set data.root"):
        source.prepare()
    assert list(tmp_path.iterdir()) == []
    # slow: another process finishes the same download before this one does
    monkeypatch.setattr(published, "download", working if kind is MNIST else slow)
    source.prepare()
    assert [path.name for path in tmp_path.iterdir()] == [published.__name__]
    assert len(source.split("train")) == 12
    monkeypatch.setattr(published, "download", broken)
    idx_source(tmp_path, kind, name, download=True).prepare()


# CIFAR-10


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    published = torchvision.datasets.CIFAR10
    rng = np.random.default_rng(0)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": rng.integers(0, 256, (4, 3072)).astype(np.uint8), "labels": [3, 1, 4, 9]}

    monkeypatch.setattr(published, "train_list", [write(f"data_batch_{k}", batch()) for k in (1, 2)])
    monkeypatch.setattr(published, "test_list", [write("test_batch", batch())])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(published, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


def cifar_source(root, download=False):
    numbers = settings(name="cifar10", channels=3, image_size=32, num_classes=10)
    return CIFAR10(root=str(root), download=download, **numbers)


def test_cifar10_is_read_from_torchvisions_folder(cifar):
    source = cifar_source(cifar)
    source.check()
    train = source.split("train")
    assert len(train) == 8 and len(source.split("test")) == 4
    batch = train.get(torch.tensor([5, 0]))
    raw = pickle.loads((cifar / "cifar-10-batches-py" / "data_batch_2").read_bytes())["data"]
    assert np.array_equal(batch["x"][0].flatten().numpy(), raw[1])
    assert batch["label"].tolist() == [1, 3]


def test_cifar10_that_is_missing_or_corrupt_is_refused(cifar, tmp_path):
    with pytest.raises(DiffxError, match=r"no folder cifar-10-batches-py; set data.root .* data=folder"):
        cifar_source(tmp_path / "empty").check()
    with (cifar / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DiffxError, match="incomplete or not as published"):
        cifar_source(cifar).split("train")


def test_cifar10_that_cannot_be_downloaded_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(DiffxError, match="cannot be downloaded"):
        cifar_source(tmp_path / "data", download=True).prepare()
    assert list((tmp_path / "data").iterdir()) == []


# image files


def write_image(path, value=0, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def write_classes(root, per_class=10, names=("cat", "dog"), start=0):
    for label, name in enumerate(names):
        for i in range(per_class):
            write_image(root / name / f"{i:03}.png", start + 100 * label + i)


def gradient(h=6, w=5):
    return np.arange(h * w * 3).reshape(h, w, 3).astype(np.uint8)


def test_grey_and_colour_are_converted(tmp_path):
    path = tmp_path / "a.png"
    write_image(path, 77)
    assert np.array_equal(read_image(path, 3, 4, False), np.full((3, 4, 4), 77))
    Image.fromarray(gradient(4, 4)).save(path)
    assert np.array_equal(read_image(path, 3, 4, False), gradient(4, 4).transpose(2, 0, 1))
    grey = gradient(4, 4) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_image(path, 1, 4, False)[0] - grey).max() <= 0.51
    write_image(path, 1, mode="1")
    assert np.array_equal(read_image(path, 1, 4, False), np.full((1, 4, 4), 255))


def test_palettes_are_looked_up(tmp_path):
    image = Image.new("P", (4, 4), 2)
    image.putpalette([0, 0, 0, 9, 9, 9, 250, 120, 30])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3, 4, False)[:, 0, 0].tolist() == [250, 120, 30]
    image.save(tmp_path / "a.png", transparency=2)
    assert read_image(tmp_path / "a.png", 3, 4, False)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 100, 200, 51), [204, 224, 244]),
        ("LA", (0, 51), [204, 204, 204]),
    ],
)
def test_transparency_is_blended_with_white(tmp_path, mode, value, expected):
    write_image(tmp_path / "a.png", value, mode=mode)
    assert read_image(tmp_path / "a.png", 3, 4, False)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "I;16"), (".tif", "I;16"), (".tif", "I;16B")])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix, mode):
    values = np.array([[0, 128, 129, 257], [30000, 65406, 65407, 65535]] * 2, np.uint16)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    path = tmp_path / f"a{suffix}"
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    assert np.array_equal(read_image(path, 1, 4, False)[0], np.round(values / 257))
    assert np.array_equal(read_image(path, 3, 4, False)[2], np.round(values / 257))


def test_cmyk_is_converted_and_unbounded_modes_are_refused(tmp_path):
    write_image(tmp_path / "a.tif", (0, 255, 0, 0), mode="CMYK")
    assert read_image(tmp_path / "a.tif", 3, 4, False)[:, 0, 0].tolist() == [255, 0, 255]
    for mode in ("F", "I"):
        write_image(tmp_path / "b.tif", 3, mode=mode)
        with pytest.raises(DiffxError, match=f"b.tif.* mode {mode}.* 8 bits"):
            read_image(tmp_path / "b.tif", 3, 4, False)


def test_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to view
    Image.fromarray(gradient(4, 4)).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(gradient(4, 4), -1).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 4, False), expected)


def test_larger_images_are_cropped_at_the_centre_and_scaled(tmp_path):
    image = gradient(4, 10)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 4, False), image[:, 3:7].transpose(2, 0, 1))
    Image.fromarray(image.transpose(1, 0, 2)).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 4, False), image[:, 3:7].transpose(2, 1, 0))
    # four times as large: two exact averages, no ringing at the edge
    Image.fromarray(np.kron(np.array([[0, 255]]), np.ones((16, 8))).astype(np.uint8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1, 4, False)[0].tolist() == [[0, 0, 255, 255]] * 4
    # a pattern finer than the result must not alias
    Image.fromarray((np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png", 1, 32, False).astype(int) - 128)[:, 4:-4, 4:-4].max() < 40


def test_small_images_are_refused_unless_they_may_be_enlarged(tmp_path):
    write_image(tmp_path / "a.png", 9, (3, 8))
    with pytest.raises(DiffxError, match=r"a.png' has 3×8 pixels.* data.image_size=3 or less.* data.upscale=true"):
        folder(tmp_path).check()
    assert folder(tmp_path, upscale=True, test_fraction=0).split("train")[0]["x"].tolist() == [[[9] * 4] * 4]


def test_flat_folders_have_no_labels_and_hold_images_out_by_name(tmp_path):
    for i in range(20):
        write_image(tmp_path / f"{i}.png", i)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    write_image(tmp_path / ".thumbnails" / "0.png")
    source = folder(tmp_path, test_fraction=0.25)
    assert source.class_names == ()
    values = {}
    for name, count in (("train", 15), ("test", 5)):
        batch = source.split(name).get(torch.arange(count))
        assert batch["label"].tolist() == [0] * count
        values[name] = set(batch["x"][:, 0, 0, 0].tolist())
    assert values["train"] | values["test"] == set(range(20)) and not values["train"] & values["test"]
    # another image hardly moves the others
    write_image(tmp_path / "20.png", 20)
    again = folder(tmp_path, test_fraction=0.25).split("test")
    assert len(set(again.get(torch.arange(5))["x"][:, 0, 0, 0].tolist()) & values["test"]) >= 4


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    write_classes(tmp_path, names=("dog", "Cat", "ant"))
    write_image(tmp_path / "dog" / "deeper" / "x.PNG", 99)
    write_image(tmp_path / ".thumbnails" / "0.png")
    source = folder(tmp_path, num_classes=3, test_fraction=0.2)
    assert source.class_names == ("Cat", "ant", "dog")
    batch = source.split("train").get(torch.arange(len(source.split("train"))))
    assert batch["label"].bincount().tolist() == [8, 8, 9]
    assert {100 * [1, 2, 0][label] for label in batch["label"].tolist()} == {0, 100, 200}
    assert all(x // 100 == [1, 2, 0][label] for x, label in zip(batch["x"][:, 0, 0, 0], batch["label"], strict=True))


def test_class_folders_need_their_number_or_to_be_declared_no_classes(tmp_path):
    write_classes(tmp_path)
    with pytest.raises(DiffxError, match=r"data.num_classes is 0, .* has 2; set data.num_classes=2"):
        folder(tmp_path).check()
    source = folder(tmp_path, labels=False, test_fraction=0)
    assert source.split("train").get(torch.arange(20))["label"].tolist() == [0] * 20
    with pytest.raises(DiffxError, match=r"test split .* has no images; set data.test_fraction"):
        source.split("test")


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_given_splits_are_kept(tmp_path, test_name):
    write_classes(tmp_path / "train", per_class=6)
    write_classes(tmp_path / test_name, per_class=2, start=50)
    source = folder(tmp_path, num_classes=2)
    assert (len(source.split("train")), len(source.split("test"))) == (12, 2 * 2)
    assert source.split("test").get(torch.arange(4))["x"][:, 0, 0, 0].tolist() == [50, 51, 150, 151]
    write_image(tmp_path / test_name / "emu" / "a.png")
    with pytest.raises(DiffxError, match="'emu' is in only one"):
        folder(tmp_path, num_classes=2).check()


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(DiffxError, match=r"no folder '.*nowhere'; set data.root"):
        folder(tmp_path / "nowhere").check()
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DiffxError, match=r"has no images \(.png"):
        folder(tmp_path).check()
    write_classes(tmp_path / "half" / "train")
    with pytest.raises(DiffxError, match="has a folder train but neither test nor val"):
        folder(tmp_path / "half").check()
    write_classes(tmp_path / "mixed")
    write_image(tmp_path / "mixed" / "stray.png")
    with pytest.raises(DiffxError, match=r"images beside them, such as stray.png"):
        folder(tmp_path / "mixed").check()
    write_classes(tmp_path / "hollow")
    (tmp_path / "hollow" / "emu").mkdir()
    with pytest.raises(DiffxError, match="emu' has no images"):
        folder(tmp_path / "hollow").check()
    with pytest.raises(DiffxError, match=r"data.channels is 2"):
        folder(tmp_path, channels=2)
    with pytest.raises(DiffxError, match=r"data.test_fraction is 1"):
        folder(tmp_path, test_fraction=1)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_classes(tmp_path / "elsewhere", names=("cat", "puppy"))
    write_classes(tmp_path / "set", names=("dog",))
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "set" / "dog" / "young").symlink_to(tmp_path / "elsewhere" / "puppy")
    (tmp_path / "set" / "dog" / "up").symlink_to(tmp_path / "set" / "dog")
    assert len(folder(tmp_path / "set", num_classes=2, test_fraction=0).split("train")) == 30


def test_corrupt_files_are_found_before_training_and_named(tmp_path):
    for name in ("a", "b", "c"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:5000])
    with pytest.raises(DiffxError, match=r"b.png' cannot be read as an image") as error:
        folder(tmp_path, test_fraction=0).split("train")
    assert "more such files" not in str(error.value)
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(DiffxError, match=r"b.png'.* \(and 1 more such files\)"):
        folder(tmp_path, test_fraction=0).split("train")
    # too large for memory: headers are checked at once, pixels when they are read
    with pytest.raises(DiffxError, match=r"c.png' cannot be read"):
        folder(tmp_path, test_fraction=0, cache_bytes=0).split("train")
    (tmp_path / "c.png").unlink()
    images = folder(tmp_path, test_fraction=0, cache_bytes=0).split("train")
    with pytest.raises(DiffxError, match=r"b.png'"):
        images.get(torch.tensor([1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_read_from_files_and_from_memory_are_the_same(tmp_path, num_workers):
    write_classes(tmp_path)
    cached = folder(tmp_path, num_classes=2, channels=3)
    lazy = folder(tmp_path, num_classes=2, channels=3, cache_bytes=100, num_workers=num_workers)
    assert isinstance(cached.split("train"), TensorImages) and isinstance(lazy.split("train"), FileImages)
    assert_same(global_batches(lazy, 5), global_batches(cached, 5))


def test_fingerprints_of_files_follow_name_size_time_and_reading(tmp_path):
    write_classes(tmp_path)

    def fingerprint(**changes):
        return folder(tmp_path, num_classes=2, cache_bytes=0, test_fraction=0, **changes).split("train").fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(channels=3))
    os.utime(tmp_path / "cat" / "000.png", (1, 1))
    seen.append(fingerprint())
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "0.png")
    seen.append(fingerprint())
    assert len(set(seen)) == 4
