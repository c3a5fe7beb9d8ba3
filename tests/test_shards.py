"""Shards: what is read is what is there, each sample once per pass, and every mistake has its sentence."""

import gzip
import io
import itertools
import os
import pickle
import shutil
import signal
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from webdataset.writer import TarWriter

from diffx.data import DataSource, GlobalBatches, StreamLoader, WebDataset
from diffx.data.decode import Crop, decode_image, decode_into, read_image
from diffx.data.shards import index_shard, load_index, open_index, save_index
from diffx.data.shards.fields import conditions
from diffx.data.shards.index import ShardIndex, beside, in_cache
from diffx.data.shards.order import Mixed, Windows
from diffx.data.shards.patterns import expand
from diffx.utils import DiffxError, Keys

torch.set_num_threads(1)
SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:sample replaced")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(k, size=SIZE):
    """An image that shows its number: its mean is far from every other's, and its left half is brighter."""
    image = np.full((size, size, 3), (k * 37 % 200, k * 53 % 200, k * 91 % 200), np.uint8)
    image[:, : size // 2] += 20
    return image


def encoded(k, kind="png", size=SIZE, **options):
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, np.ascontiguousarray(pixels(k, size).transpose(2, 0, 1)))
    else:
        Image.fromarray(pixels(k, size)).save(file, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
    return file.getvalue()


def write_shard(path, numbers, kind="png", **parts):
    """A shard of the samples of some numbers, by WebDataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as shard:
        for k in numbers:
            sample = {"__key__": f"{k:06d}", kind: encoded(k, kind), "cls": k % 5}
            shard.write(sample | {name: value(k) for name, value in parts.items()})
    return path


def write_members(path, members, **options):
    """A tar of named bytes, in any order, as any program may have written it."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def source(shards, **changes):
    plain = {"name": "shards", "channels": 3, "image_size": SIZE, "num_classes": 5, "batch_size": 8, "flip": False}
    return WebDataset(
        shards=shards if isinstance(shards, list) else str(shards),
        **{**plain, "num_workers": 0, "test_fraction": 0.0, "shuffle_shards": 2, **changes},
    )


@pytest.fixture
def uneven(tmp_path):
    """Five shards of 7, 1, 12, 3 and 6 samples, 29 in all."""
    ends = list(itertools.accumulate([7, 1, 12, 3, 6], initial=0))
    for k, (first, last) in enumerate(itertools.pairwise(ends)):
        write_shard(tmp_path / "uneven" / f"{k}.tar", range(first, last))
    return tmp_path / "uneven"


def global_batches(data, steps, world_size=1, accumulate=1, start_step=0, seed=3):
    """The global batches of some steps, put together from the chunks of all ranks."""
    loaders = [iter(data.train_loader(seed, start_step, rank, world_size, accumulate)) for rank in range(world_size)]
    batches = []
    for _ in range(steps):
        chunks = [next(loader) for _ in range(accumulate) for loader in loaders]
        batches.append({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
    return batches


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


def numbers_of(x):
    """Which sample each image shows; -1 for none of the first 200."""
    known = {pixels(k)[0, 0].tobytes(): k for k in range(200)}
    # mirrored or not: the brighter half has the colour of the first pixel
    corner = torch.maximum(x[:, :, 0, 0], x[:, :, 0, -1]).numpy()
    return [known.get(one.tobytes(), -1) for one in corner]


def together(batches, name):
    return torch.cat([batch[name] for batch in batches])


# ---- the index ----


def test_an_index_says_where_the_bytes_of_each_part_are(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(9), txt=lambda k: f"caption {k}")
    index = index_shard(path)
    assert len(index) == 9 and index.complete and index.extensions == ("cls", "png", "txt")
    assert index.keys() == [b"%06d" % k for k in range(9)] and index.key(3) == "000003"
    assert index.labels.tolist() == [k % 5 for k in range(9)]
    data = path.read_bytes()
    for name, expected in (("png", encoded), ("txt", lambda k: f"caption {k}".encode())):
        offsets, sizes = index.part(name)
        assert [data[o : o + s] for o, s in zip(offsets, sizes, strict=True)] == [expected(k) for k in range(9)]
    assert index.part("jpg")[0].tolist() == [-1] * 9


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read_as_they_are(tmp_path, format):
    long = "a folder/" + "deep/" * 60 + "é" * 20
    members = [
        ("./b.x/k.JPG", b"1" * 700),
        ("loose", b"no extension"),
        ("b.x/.hidden.jpg", b"no sample"),
        ("__index__.json", b"not a sample either"),
        ("b.x/k.seg.png", b"22"),
        ("c.jpg", b""),
        ("b.x/k.txt", b"333"),
    ]
    if format != tarfile.USTAR_FORMAT:
        members += [(f"{long}.jpg", b"4444"), (f"{long}.txt", b"5")]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder, link = tarfile.TarInfo("b.x"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "c.jpg"
        tar.addfile(folder)
        tar.addfile(link)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5  # a pax header, where there are any
            tar.addfile(info, io.BytesIO(content))
    index, data = index_shard(path), path.read_bytes()
    found = {
        (key.decode(), extension): data[o : o + s]
        for extension in index.extensions
        for key, o, s in zip(index.keys(), *index.part(extension), strict=True)
        if o >= 0
    }
    expected = {("b.x/k", "jpg"): b"1" * 700, ("b.x/k", "seg.png"): b"22", ("c", "jpg"): b"", ("b.x/k", "txt"): b"333"}
    if format != tarfile.USTAR_FORMAT:
        expected |= {(long, "jpg"): b"4444", (long, "txt"): b"5"}
    assert found == expected and index.labels is None


def same_index(index, other):
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(index).items())


def test_an_index_is_kept_while_the_shard_is_the_same(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(9))
    assert load_index(path) is None
    index = open_index(path)
    assert beside(path).is_file() and same_index(load_index(path), index)
    # a copy without its times is the same shard, another content is not
    os.utime(path, (1, 1))
    assert same_index(load_index(path), index)
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert load_index(path) is None and open_index(path).mtime_ns != index.mtime_ns
    write_shard(path, range(8))
    assert load_index(path) is None and len(open_index(path)) == 8
    beside(path).write_bytes(b"PK nonsense")
    assert load_index(path) is None and len(open_index(path)) == 8


def test_where_nothing_can_be_written_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", range(9))
    real = Path.mkdir
    monkeypatch.setattr(
        "diffx.data.shards.index.tempfile.mkstemp",
        lambda *, dir, **rest: _refused() if dir == tmp_path else _mkstemp(dir=dir, **rest),
    )
    open_index(path)
    assert real is Path.mkdir and not beside(path).exists() and in_cache(path).is_file()
    assert load_index(path) is not None
    monkeypatch.setattr("diffx.data.shards.index.tempfile.mkstemp", lambda **rest: _refused())
    in_cache(path).unlink()
    with pytest.warns(UserWarning, match=r"the index of '.*a.tar' cannot be saved"):
        assert save_index(index_shard(path)) is None


def _refused():
    raise PermissionError(30, "Read-only file system")


_mkstemp = __import__("tempfile").mkstemp


@pytest.mark.parametrize("length", [8191, 8080, 8079, 7600, 7168, 7167, 7056, 6700, 6656, 6144, 2000, 1936])
def test_a_shard_without_its_end_keeps_what_is_whole(tmp_path, length):
    members = [(f"{k}.{name}", bytes([k]) * 400) for k in range(4) for name in ("jpg", "txt")]
    path = write_members(tmp_path / "a.tar", members)
    data = path.read_bytes()
    assert index_shard(path).complete
    path.write_bytes(data[:length])
    index = index_shard(path)
    # a header and a block for the data of each member: sample k ends 1,936 bytes behind its beginning
    assert not index.complete
    assert index.keys() == [b"%d" % k for k in range(4) if length >= 2048 * k + 1936]
    for part in ("jpg", "txt"):
        assert [data[o : o + s] for o, s in zip(*index.part(part), strict=True)] == [
            bytes([k]) * 400 for k in range(len(index))
        ]


def broken(path, kind):
    """A shard that cannot be indexed."""
    name, data = path / "a.tar", write_shard(path / "b.tar", range(3)).read_bytes()
    if kind == "missing":
        return name
    if kind == "gzip":
        name = path / "a.tar.gz"
        data = gzip.compress(data)
    if kind == "parquet":
        name = path / "a.parquet"
    if kind == "empty":
        data = b""
    if kind == "no samples":
        data = bytes(10240)
    if kind == "no tar":
        data = b"<html>not found</html>" * 100
    if kind == "damaged":
        at = data.index(b"000001.png")
        data = data[:at] + b"x" * 40 + data[at + 40 :]
    name.write_bytes(data)
    members = {
        "twice": [("x/1.jpg", b"a"), ("x/2.jpg", b"b"), ("x/1.jpg", b"c")],
        "traversal": [("../../etc/passwd.jpg", b"a")],
        "absolute": [("/etc/passwd.jpg", b"a")],
        "dots": [(f"a.{k}.jpg", b"") for k in range(99)],
    }
    if kind in members:
        write_members(name, members[kind])
    return name


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", r"there is no shard '.*a\.tar'; correct data\.shards"),
        ("gzip", r"'.*a\.tar\.gz' is compressed with gzip, .*; unpack it to a plain \.tar"),
        ("parquet", r"'.*a\.parquet' is no \.tar file; set data\.shards"),
        ("empty", r"'.*a\.tar' is empty; fetch or write it anew"),
        ("no samples", r"'.*a\.tar' holds no samples, .*; remove it"),
        ("no tar", r"'.*a\.tar' is damaged or no tar file .*; fetch or write it anew"),
        ("damaged", r"'.*a\.tar' is damaged or no tar file .*at byte [\d,]+.*; fetch"),
        ("twice", r"'.*a\.tar' holds 'x/1\.jpg' twice, .*'x/1'; write the shard anew"),
        ("traversal", r"'.*a\.tar' holds '\.\./\.\./etc/passwd\.jpg', a name that leads out of its folder"),
        ("absolute", r"'.*a\.tar' holds '/etc/passwd\.jpg', a name that leads out of its folder"),
        ("dots", r"'.*a\.tar' has more than 64 extensions, such as that of 'a\.64\.jpg'"),
    ],
)
def test_shards_that_are_none_have_a_sentence(tmp_path, kind, sentence):
    path = broken(tmp_path, kind)
    for act in (lambda: open_index(path), lambda: source(path, num_classes=0).check()):
        with pytest.raises(DiffxError, match=sentence) as error:
            act()
        assert "\n" not in str(error.value)
    assert not beside(path).exists()


# ---- which shards ----


def test_patterns_folders_and_lists_name_shards(uneven):
    every = [str(uneven / f"{k}.tar") for k in range(5)]
    assert expand(str(uneven), Path()) == every
    assert expand(f"{uneven}/*.tar", Path()) == every
    assert expand(f"{uneven}/{{0..2}}.tar", Path()) == every[:3]
    assert expand("[01].tar", uneven) == every[:2] and expand("4.tar", uneven) == every[4:]
    assert expand([f"{uneven}/3.tar", "0.tar::1.tar"], uneven) == [every[3], *every[:2]]
    assert expand(f"file:{every[1]}", Path()) == every[1:2]
    assert expand("http://h/{0..1}.tar", Path()) == ["http://h/0.tar", "http://h/1.tar"]


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ("nowhere", r"there is no shard '.*nowhere'; correct data\.shards"),
        ("*.tgz", r"nothing matches '.*\*\.tgz'; correct data\.shards"),
        ("hollow", r"the folder '.*hollow' has no \.tar files; set data\.shards"),
        (["0.tar", "*.tar"], r"data\.shards names the shard '.*0\.tar' twice; name it once"),
        ([], r"data\.shards names no shards"),
        ("x-{0..3.tar", r"data\.shards=x-\{0\.\.3\.tar cannot be expanded .*; close every brace"),
    ],
)
def test_shards_that_are_not_there(uneven, shards, sentence):
    (uneven / "hollow").mkdir()
    with pytest.raises(DiffxError, match=sentence):
        source(shards, root=str(uneven)).check()


# ---- order ----


@pytest.mark.parametrize("window", [0, 1, 2, 3, 100])
def test_windows_are_passes_over_all_rows(window):
    counts = torch.tensor([3, 0, 5, 1, 7, 2])
    firsts = torch.tensor([100, 200, 300, 400, 500, 600])
    every = torch.cat([first + torch.arange(count) for first, count in zip(firsts, counts, strict=True)])
    order = Windows(firsts, counts, window, seed=1)
    rows = order.rows(torch.arange(3 * 18))
    passes = rows.reshape(3, 18)
    for one in passes:
        assert one.sort().values.equal(every)
    assert not passes[0].equal(passes[1])
    # at any place on its own, in any pieces, and by a new object
    again = Windows(firsts, counts, window, seed=1)
    assert [int(again.rows(torch.tensor([n]))) for n in (53, 0, 17, 18, 40)] == rows[[53, 0, 17, 18, 40]].tolist()
    assert torch.cat([again.rows(part) for part in torch.arange(54).split(7)]).equal(rows)
    assert again.rows(torch.arange(0, 54, 5)).equal(rows[::5])
    assert not Windows(firsts, counts, window, seed=2).rows(torch.arange(54)).equal(rows)
    if window:  # what a window mixes are the rows of so many shards
        shards = (rows.reshape(3, 18) // 100).tolist()
        for one in shards:
            order_of_shards = [len(list(group)) for _, group in itertools.groupby(one)]
            assert len(order_of_shards) == 5 if window == 1 else len(order_of_shards) >= 5
    assert set(order.shards(0)) <= {0, 2, 3, 4, 5}


def test_a_window_is_uniform():
    # each of 12 rows of two shards at each of 12 places, over many passes
    order = Windows(torch.tensor([0, 5]), torch.tensor([5, 7]), 2, seed=0)
    passes = order.rows(torch.arange(12 * 3000)).reshape(3000, 12)
    table = torch.stack([(passes == row).float().mean(0) for row in range(12)])
    assert (table - 1 / 12).abs().max() < 0.025


def test_mixtures_have_their_shares_and_each_source_its_passes():
    a = Windows(torch.tensor([0]), torch.tensor([50]), 1, seed=0, stream="/a")
    b = Windows(torch.tensor([100]), torch.tensor([1000]), 1, seed=0, stream="/b")
    order = Mixed([a, b], [1, 3], seed=0)
    n = torch.arange(2 * 65536)
    rows = order.rows(n)
    first = rows[rows < 100]
    assert len(first) == 2 * 65536 // 4 and (rows[:65536] < 100).sum() == 65536 // 4
    assert first[: 50 * (len(first) // 50)].reshape(-1, 50).sort().values.eq(torch.arange(50)).all()
    second = rows[rows >= 100][:2000].reshape(2, 1000)
    assert second.sort().values.equal(torch.arange(100, 1100).expand(2, 1000))
    assert torch.cat([order.rows(part) for part in n.split(977)]).equal(rows)
    again = Mixed([a, b], [2, 6], seed=0)
    assert int(again.rows(torch.tensor([65_600]))) == int(rows[65_600])
    # in units of a batch
    steps = Mixed([a, b], [1, 3], seed=0, unit=8)
    chosen = steps.rows(torch.arange(8 * 300)).reshape(300, 8) < 100
    assert (chosen.all(1) | ~chosen.any(1)).all() and 50 < chosen.all(1).sum() < 100
    assert steps.choice(8 * 7 + 3) == int(not chosen[7, 3])


@pytest.mark.parametrize(("weights", "sentence"), [([1.0, 0.0], "must be above 0"), ([1.0, 1e-9], "rounds to 0")])
def test_weights_without_meaning(weights, sentence):
    order = Windows(torch.tensor([0]), torch.tensor([5]), 1, seed=0)
    with pytest.raises(DiffxError, match=rf"data\.weights is .*{sentence}"):
        Mixed([order, order], weights, seed=0)


# ---- the stream ----


@pytest.mark.parametrize("kind", ["png", "jpg", "npy"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_sample_once_per_pass_with_its_label(uneven, tmp_path, kind, flip):
    if kind != "png":
        for file in uneven.iterdir():
            write_shard(tmp_path / kind / file.name, list(map(int, index_shard(file).keys())), kind)
    batches = global_batches(source(uneven if kind == "png" else tmp_path / kind, flip=flip), 12)
    x, label, index = (together(batches, name)[:87] for name in ("x", "label", "index"))
    assert index.equal(torch.arange(87))
    if kind == "jpg":
        found = torch.stack([decoded(k) for k in range(29)])
        numbers = [int(((found - one).abs().amax((1, 2, 3)) == 0).nonzero()[0]) for one in torch.minimum(x, x.flip(-1))]
    else:
        numbers = numbers_of(x)
    assert [sorted(numbers[k : k + 29]) for k in (0, 29, 58)] == [list(range(29))] * 3
    assert numbers[:29] != numbers[29:58]
    assert label.tolist() == [k % 5 for k in numbers]
    mirrored = x[:, 0, 0, 0] < x[:, 0, 0, -1]
    expected = Keys(3, index).uniform("flip") < 0.5
    assert mirrored.equal(expected if flip else torch.zeros(87, dtype=torch.bool))


def decoded(k):
    image = torch.from_numpy(decode_image(encoded(k, "jpeg"), "", 3, (SIZE, SIZE), False)).permute(2, 0, 1)
    return torch.minimum(image, image.flip(-1))


RANKS_AND_WORKERS = [(1, 1, 1), (1, 2, 3), (2, 1, 0), (2, 2, 1), (4, 1, 3), (4, 2, 0), (8, 1, 0), (1, 1, 3)]


@pytest.mark.parametrize(("world_size", "accumulate", "num_workers"), RANKS_AND_WORKERS)
def test_the_stream_is_the_same_for_any_ranks_accumulation_and_workers(uneven, world_size, accumulate, num_workers):
    settings = {"flip": True, "random_crop": 0.5}
    expected = global_batches(source(uneven, **settings), 8)
    data = source(uneven, num_workers=num_workers, **settings)
    assert_same(global_batches(data, 8, world_size, accumulate), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_continues_the_stream_at_any_step(uneven, num_workers):
    whole = global_batches(source(uneven), 12)
    for start in (1, 4, 7, 11):
        data = source(uneven, num_workers=num_workers)
        assert_same(global_batches(data, 12 - start, world_size=2, start_step=start), whole[start:])


def test_a_far_sample_reads_nothing_before_it(uneven, monkeypatch):
    data = source(uneven)
    data.check()
    asked = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: asked.append(size) or real(file, size, offset))
    batch = next(iter(data.train_loader(0, start_step=10**9)))
    assert batch["index"][0] == 8 * 10**9 and len(asked) == 8


def test_a_stream_survives_being_sent_to_a_worker_that_is_not_forked(uneven):
    data = source(uneven)
    loader = data.train_loader(3)
    copy = pickle.loads(pickle.dumps(loader.dataset))
    assert_same([copy.__getitems__(range(8, 16))], [loader.dataset.__getitems__(range(8, 16))])


def test_batches_are_their_own_memory(uneven):
    batches = iter(source(uneven, num_workers=1, batch_size=4).train_loader(3))
    kept = [next(batches) for _ in range(12)]
    expected = global_batches(source(uneven, batch_size=4), 12)
    assert_same(kept, expected)
    kept[0]["x"].zero_()
    assert torch.equal(kept[1]["x"], expected[1]["x"])
    assert source(uneven).split("train").get(torch.arange(3))["x"].is_contiguous()


def test_the_number_of_workers_follows_the_cores(uneven, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert source(uneven, num_workers=None).num_workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert source(uneven, num_workers=None).num_workers == 3


# ---- what is read ----


def test_splits_are_shards_or_a_share_of_the_samples(uneven):
    given = source(uneven, test_shards="[13].tar", root=str(uneven))
    assert (len(given.split("train")), len(given.split("test"))) == (25, 4)
    assert numbers_of(given.split("test").get(torch.arange(4))["x"]) == [7, 20, 21, 22]
    assert "25 train and 4 test images of 3×8×8 pixels, 5 classes, in 5 shards" in given.describe()
    train = together(global_batches(given, 25), "x")
    assert set(numbers_of(train)) == set(range(29)) - {7, 20, 21, 22}
    share = source(uneven, test_fraction=0.3)
    parts = {
        name: numbers_of(share.split(name).get(torch.arange(len(share.split(name))))["x"]) for name in ("train", "test")
    }
    assert sorted(parts["train"] + parts["test"]) == list(range(29)) and 4 <= len(parts["test"]) <= 13
    # whatever the shards: the keys decide
    write_shard(uneven / "all.tar", range(40))
    more = source(uneven / "all.tar", test_fraction=0.3).split("test")
    assert [k for k in numbers_of(more.get(torch.arange(len(more)))["x"]) if k < 29] == sorted(parts["test"])
    with pytest.raises(DiffxError, match=r"the test split of data=shards has no images; set data\.test_shards"):
        source(uneven).split("test")
    with pytest.raises(DiffxError, match="did you mean 'train'"):
        source(uneven).split("trian")


def test_fingerprints_follow_the_shards_and_the_choice(uneven):
    fingerprints = {source(uneven).split("train").fingerprint(), source(uneven).split("train").fingerprint()}
    assert len(fingerprints) == 1
    fingerprints.add(source(uneven, test_fraction=0.5).split("train").fingerprint())
    fingerprints.add(source(uneven, test_fraction=0.5).split("test").fingerprint())
    write_shard(uneven / "1.tar", [99])
    fingerprints.add(source(uneven).split("train").fingerprint())
    assert len(fingerprints) == 4


def test_weights_choose_how_often_a_source_is_drawn_from(uneven):
    data = source(["[01].tar", "[234].tar"], root=str(uneven), weights=[3.0, 1.0], batch_size=64)
    numbers = numbers_of(together(global_batches(data, 64), "x"))
    few = [k for k in numbers if k < 8]
    assert 0.72 < len(few) / len(numbers) < 0.78
    assert all(sorted(few[k : k + 8]) == list(range(8)) for k in range(0, len(few) - 8, 8))
    many = [k for k in numbers if k >= 8]
    assert all(sorted(many[k : k + 21]) == list(range(8, 29)) for k in range(0, len(many) - 21, 21))
    expected = global_batches(data, 8)
    split = source(["[01].tar", "[234].tar"], root=str(uneven), weights=[3.0, 1.0], batch_size=64, num_workers=1)
    assert_same(global_batches(split, 8, world_size=2), expected)
    for weights, shards in (([1.0], ["0.tar", "1.tar"]), ([1.0, 2.0], "0.tar")):
        with pytest.raises(DiffxError, match=r"data\.weights has . numbers, .*; give one for each entry"):
            source(shards, weights=weights)
    with pytest.raises(DiffxError, match=r"'.*0\.tar' in two entries"):
        source(["*.tar", "0.tar"], root=str(uneven), weights=[1.0, 1.0]).check()


def test_conditions_leave_samples_out_and_keep_the_order_exact(tmp_path):
    document = {"json": lambda k: {"width": 100 + k, "height": 8, "meta": {"licence": "cc0" if k % 3 else "none"}}}
    for name, numbers in (("a", range(12)), ("b", range(12, 30))):
        write_shard(tmp_path / "d" / f"{name}.tar", numbers, **document)
    data = source(tmp_path / "d", filter=["width>=110", "meta.licence==cc0"], batch_size=4)
    expected = [k for k in range(10, 30) if k % 3]
    numbers = numbers_of(together(global_batches(data, 2 * len(expected) // 4 + 1), "x"))
    assert sorted(numbers[: len(expected)]) == expected
    assert sorted(numbers[len(expected) : 2 * len(expected)]) == expected
    assert f"left out: {30 - len(expected)} filtered" in data.describe()
    assert len(source(tmp_path / "d", filter="width<=105").split("train")) == 6
    with pytest.raises(DiffxError, match=r"no sample of '.*a\.tar' has the json field 'widht' .*did you mean 'width'"):
        source(tmp_path / "d", filter="widht>3").check()
    with pytest.raises(DiffxError, match=r"the train split .* has no images, 30 filtered"):
        source(tmp_path / "d", filter="width>1000").check()


def test_conditions_on_sizes_need_no_json(tmp_path):
    images = [(f"{k}.{kind}", encoded(k, kind, size=8 + k)) for k in range(10) for kind in ("jpeg", "png")[k % 2 :][:1]]
    write_members(tmp_path / "a.tar", images)
    assert len(source(tmp_path / "a.tar", num_classes=0, filter=["width>=12", "height<17"]).split("train")) == 5


@pytest.mark.parametrize("text", ["width", "width=>3", "licence<cc0", ">=3"])
def test_conditions_that_are_none(text):
    with pytest.raises(DiffxError, match=rf"data\.filter has '{text}'"):
        conditions([text])


def test_labels_come_from_a_part_or_a_field(tmp_path):
    write_shard(
        tmp_path / "a.tar", range(10), json=lambda k: {"class": {"id": 4 - k % 5}}, **{"index.txt": lambda k: "3"}
    )
    labels = {}
    for label in ("cls", "json.class.id", "index.txt"):
        batch = source(tmp_path / "a.tar", label=label).split("train").get(torch.arange(10))
        labels[label] = batch["label"].tolist()
    assert labels["cls"] == [k % 5 for k in range(10)] and labels["json.class.id"] == [4 - k % 5 for k in range(10)]
    assert labels["index.txt"] == [3] * 10
    assert source(tmp_path / "a.tar", num_classes=0).split("train").get(torch.arange(10))["label"].tolist() == [0] * 10
    assert source(tmp_path / "a.tar").class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("changes", "members", "sentence"),
    [
        (
            {"num_classes": 4},
            {},
            r"the label of '.*a\.tar/000004\.cls' is 4, and labels are 0 to 3; set data\.num_classes=5",
        ),
        (
            {},
            {"000009.cls": b"-1"},
            r"the label of '.*a\.tar/000009\.cls' is -1, and labels are 0 to 4; write the shard",
        ),
        ({}, {"000009.cls": b"cat"}, r"'.*a\.tar/000009\.cls' is 'cat', no whole number; set data\.label"),
        ({"label": "json.class"}, {}, r"the sample '000000' of '.*a\.tar' has no json\.class; .*\(it has .*cls, png\)"),
        ({"label": "json.class"}, {"000000.json": b"{"}, r"'.*a\.tar/000000\.json' cannot be read as JSON"),
        ({}, {"000009.txt": b"", "000009.cls": None}, r"the sample '000009' of '.*a\.tar' has no cls"),
        ({"image": "jpg"}, {}, r"'.*a\.tar' has no part jpg, its samples have cls, png; set data\.image"),
        ({"image": "npy"}, {}, r"'.*a\.tar' has no part npy"),
    ],
)
def test_parts_that_are_missing_or_wrong_are_named(tmp_path, changes, members, sentence):
    plain = {
        f"{k:06d}.{name}": value for k in range(10) for name, value in (("cls", b"%d" % (k % 5)), ("png", encoded(k)))
    }
    found = {name: data for name, data in (plain | members).items() if data is not None}
    write_members(tmp_path / "a.tar", found.items())
    with pytest.raises(DiffxError, match=sentence) as error:
        source(tmp_path / "a.tar", **changes).check()
    assert "\n" not in str(error.value)


def test_samples_without_an_image_are_left_out_and_counted(tmp_path):
    write_members(tmp_path / "a.tar", [("0.png", encoded(0)), ("1.txt", b"no image"), ("2.png", encoded(2))])
    data = source(tmp_path / "a.tar", num_classes=0)
    assert len(data.split("train")) == 2 and "left out: 1 without image" in data.describe()


def test_captions_are_bytes_with_a_length(tmp_path):
    captions = ["", "a cat", "ein Käfer", "日本語の説明", "x" * 100]
    write_shard(tmp_path / "a.tar", range(5), txt=lambda k: captions[k], json=lambda k: {"caption": captions[k][::-1]})
    for text, expected in (("txt", captions), ("json.caption", [caption[::-1] for caption in captions])):
        (batch,) = global_batches(source(tmp_path / "a.tar", text=text, text_bytes=16, batch_size=5), 1)
        assert batch["text"].dtype == torch.uint8 and batch["text"].shape == (5, 16)
        for k, row, length in zip(numbers_of(batch["x"]), batch["text"], batch["text_length"].tolist(), strict=True):
            found = bytes(row[:length].tolist()).decode()
            assert expected[k].startswith(found) and not row[length:].any()
            # nothing but what does not fit is missing, and no half character is left
            assert found == expected[k] or 16 - 3 < length <= 16
    whole = source(tmp_path / "a.tar", text="txt", batch_size=5)
    lossy = source(tmp_path / "a.tar", text="txt", batch_size=5, caption_dropout=0.5)
    kept, lost = global_batches(whole, 40), global_batches(lossy, 40, world_size=5)
    dropped = Keys(3, torch.arange(200)).uniform("caption_drop") < 0.5
    assert 60 < dropped.sum() < 140
    for name in ("text", "text_length"):
        expected = together(kept, name).clone()
        expected[dropped] = 0
        assert together(lost, name).equal(expected)
    with pytest.raises(DiffxError, match=r"data\.caption_dropout=0\.5 needs captions; set data\.text=txt"):
        source(tmp_path / "a.tar", caption_dropout=0.5)


def test_random_crops_move_and_zoom_by_the_sample_number(tmp_path):
    # the value of a pixel is its place: 40 wide, 20 high
    picture = np.stack([*np.meshgrid(np.arange(40) * 6, np.arange(20) * 6), np.zeros((20, 40))], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    write_members(tmp_path / "a.tar", [("0.png", file.getvalue())])
    plain = {"num_classes": 0, "image_size": 16, "batch_size": 50}

    def extents(**changes):
        x = together(global_batches(source(tmp_path / "a.tar", **plain, **changes), 4), "x").float() / 6
        return x[:, 0, 8, 0], x[:, 0, 8, -1] - x[:, 0, 8, 0], x[:, 1, 0, 8]

    left, width, _ = extents()
    assert left.unique().numel() == 1 and width.unique().numel() == 1
    assert 9 < left[0] < 11 and 18 < width[0] < 20
    left, width, top = extents(random_crop=1.0)
    assert left.min() < 2 and left.max() > 17 and top.max() < 1.5 and width.max() - width.min() < 1.5
    left, width, top = extents(random_crop=0.5)
    # not enlarged: the smallest crop is 16 of the 20 rows
    assert width.min() < 15.5 and width.max() > 18 and top.max() > 2.5
    assert_same(
        global_batches(source(tmp_path / "a.tar", **plain, random_crop=0.5), 2, world_size=2),
        global_batches(source(tmp_path / "a.tar", **plain, random_crop=0.5), 2),
    )


def test_crops_cover_what_they_should():
    image = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10))
    file = io.BytesIO()
    image.save(file, "PNG")
    first = decode_image(file.getvalue(), "", 1, (10, 5), False, Crop(1.0, 0.0, 0.0))
    last = decode_image(file.getvalue(), "", 1, (10, 5), False, Crop(1.0, 0.999, 0.999))
    assert first[..., 0].tolist() == np.arange(100).reshape(10, 10)[:, :5].tolist()
    assert last[..., 0].tolist() == np.arange(100).reshape(10, 10)[:, 5:].tolist()


@pytest.fixture
def shapes(tmp_path):
    """24 wide, 12 high and 5 square images in two shards."""
    sizes = [(16, 8)] * 24 + [(8, 16)] * 12 + [(10, 10)] * 5
    images = []
    for k, (width, height) in enumerate(sizes):
        file = io.BytesIO()
        Image.new("RGB", (width, height), (k * 6, 0, 0)).save(file, "PNG")
        images.append((f"{k}.png", file.getvalue()))
    order = np.random.default_rng(0).permutation(len(images))
    for k, part in enumerate((order[:17], order[17:])):
        write_members(tmp_path / f"{k}.tar", [images[j] for j in part])
    return str(tmp_path)


def test_buckets_are_one_per_step_and_lose_nothing(shapes):
    settings = {"num_classes": 0, "buckets": ["16x8", "8x16", "8x8"], "batch_size": 4}
    batches = global_batches(source(shapes, **settings), 240)
    seen = {(8, 16): [], (16, 8): [], (8, 8): []}
    for batch in batches:
        seen[tuple(batch["x"].shape[2:])] += (batch["x"][:, 0, 0, 0] // 6).tolist()
    members = {(8, 16): range(24), (16, 8): range(24, 36), (8, 8): range(36, 41)}
    for size, expected in members.items():
        found, n = seen[size], len(expected)
        passes = [sorted(found[k : k + n]) for k in range(0, len(found) - n + 1, n)]
        # what does not fill a batch is carried into the next pass: all samples, pass after pass
        assert len(passes) > 12 and all(one == list(expected) for one in passes)
        assert abs(len(found) / 960 - n / 41) < 0.08
    for world_size, accumulate, start in ((2, 1, 0), (2, 2, 100), (4, 1, 239)):
        others = global_batches(
            source(shapes, num_workers=1, **settings), 240 - start if start else 20, world_size, accumulate, start
        )
        assert_same(others, batches[start:] if start else batches[:20])
    assert "of 3×16×8, 8×16, 8×8 pixels" in source(shapes, **settings).describe()
    with pytest.raises(DiffxError, match=r"data\.buckets has '16by8'; write WIDTHxHEIGHT"):
        source(shapes, buckets=["16by8"])


# ---- images of all kinds ----


def kinds_of_images():
    """Files that are no plain JPEG, with the pixels they should give."""
    k = pixels(3)
    grey = np.asarray(Image.fromarray(k).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 3
    deep = (np.stack([grey], -1)[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    return {
        "grey.jpg": (Image.fromarray(grey), "JPEG", {}),
        "cmyk.jpg": (Image.fromarray(k).convert("CMYK"), "JPEG", {}),
        "turned.jpg": (Image.fromarray(k), "JPEG", {"exif": exif}),
        "progressive.jpg": (Image.fromarray(k), "JPEG", {"progressive": True}),
        "palette.png": (Image.fromarray(k).convert("P"), "PNG", {}),
        "alpha.png": (Image.fromarray(k).convert("RGBA"), "PNG", {}),
        "deep.png": (Image.fromarray(deep), "PNG", {}),
        "moving.webp": (
            Image.fromarray(k),
            "WEBP",
            {"save_all": True, "append_images": [Image.fromarray(pixels(4))], "lossless": True},
        ),
        "still.webp": (Image.fromarray(k), "WEBP", {"lossless": True}),
        "large.jpg": (Image.fromarray(pixels(3, 50)), "JPEG", {}),
        "wide.png": (Image.fromarray(pixels(3, 50)[:20]), "PNG", {}),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(kinds_of_images()))
def test_images_of_all_kinds_are_read_as_from_a_folder(tmp_path, name, channels):
    image, format, options = kinds_of_images()[name]
    image.save(tmp_path / name, format, **options)
    write_members(tmp_path / "a.tar", [(name, (tmp_path / name).read_bytes())])
    data = source(tmp_path / "a.tar", channels=channels, num_classes=0, on_error="raise")
    found = data.split("train").get(torch.tensor([0]))["x"][0]
    assert np.array_equal(found.numpy(), read_image(tmp_path / name, channels, SIZE, False))
    if name == "moving.webp" and channels == 3:
        assert np.array_equal(found.numpy(), pixels(3).transpose(2, 0, 1))


def test_fast_jpegs_have_the_pixels_of_pil(monkeypatch):
    pytest.importorskip("simplejpeg")
    from diffx.data import decode

    def refuse(*args):
        raise AssertionError("PIL was asked")

    draw = np.random.default_rng(0)
    files = []
    for quality, subsampling in ((50, 0), (90, 1), (95, 2)):
        for shape in ((8, 8, 3), (17, 33, 3), (64, 80, 3), (16, 16), (70, 90)):
            file = io.BytesIO()
            noise = draw.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(noise).save(
                file, "JPEG", quality=quality, subsampling=subsampling if len(shape) == 3 else -1
            )
            files.append(file.getvalue())
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    monkeypatch.setattr(decode, "_guarded", refuse)
    for data, pixels_ in zip(files, expected, strict=True):
        assert np.array_equal(decode_image(data, "", 3, pixels_.shape[:2], False), pixels_)
        for mirrored in (False, True):
            written = np.empty_like(pixels_)
            decode_into(written, data, "", False, mirrored=mirrored)
            assert np.array_equal(written, pixels_[:, ::-1] if mirrored else pixels_)


# ---- what cannot be read ----


def with_corrupt(tmp_path, corrupt, n=40, kind="png"):
    """Two shards in which some images are broken."""
    for name, numbers in (("a", range(n // 2)), ("b", range(n // 2, n))):
        members = []
        for k in numbers:
            data = encoded(k, kind)
            members += [
                (f"{k:06d}.{kind}", corrupt(data) if k in (3, 4, n - 1) else data),
                (f"{k:06d}.cls", b"%d" % (k % 5)),
            ]
        write_members(
            tmp_path / "bad" / f"{name}.tar" if (tmp_path / "bad").mkdir(exist_ok=True) is None else "", members
        )
    return tmp_path / "bad"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("corrupt", [lambda data: data[: len(data) // 2], lambda data: b"<html>", lambda data: b""])
def test_corrupt_samples_are_replaced_the_same_everywhere_and_counted(tmp_path, corrupt, num_workers):
    bad = with_corrupt(tmp_path, corrupt)
    data = source(bad, max_skipped=0.1, num_workers=num_workers)
    loader = data.train_loader(3)
    batches = list(itertools.islice(loader, 10))
    numbers = numbers_of(together(batches, "x"))
    # 3 and 4 are replaced by 5, the last of all by the first
    replaced = {3: 5, 4: 5, 39: 0}
    assert sorted(numbers[:40]) == sorted(replaced.get(k, k) for k in range(40))
    assert together(batches, "label").tolist() == [k % 5 for k in numbers]
    assert loader.replaced == 6
    assert all(batch.keys() == {"x", "label", "index"} for batch in batches)
    assert_same(global_batches(source(bad, max_skipped=0.1), 10, world_size=4), batches)


def test_corrupt_samples_are_named_and_may_be_fatal(tmp_path):
    bad = with_corrupt(tmp_path, lambda data: data[:30])
    with pytest.warns(UserWarning, match=r"sample replaced: '.*a\.tar/000003' cannot be read as an image"):
        global_batches(source(bad, max_skipped=0.1), 5)
    for num_workers in (0, 1):
        with pytest.raises(
            DiffxError, match=r"'.*\.tar/0000..' cannot be read .*; or set data\.on_error=skip"
        ) as error:
            global_batches(source(bad, on_error="raise", num_workers=num_workers), 5)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_corrupt_samples_are_fatal(tmp_path, num_workers):
    bad = with_corrupt(tmp_path, lambda data: data[:30])
    sentence = r"3 of the \d+ samples .* more than data\.max_skipped=0\.002; the last was: '.*\.tar/0000"
    with pytest.raises(DiffxError, match=sentence) as error:
        global_batches(source(bad, max_skipped=0.002, num_workers=num_workers), 100)
    assert "\n" not in str(error.value)


def test_a_shard_of_corrupt_samples_only_does_not_spin(tmp_path):
    write_members(tmp_path / "a.tar", [(f"{k}.png", b"x") for k in range(5)])
    with pytest.raises(DiffxError, match=r"64 samples in a row cannot be read, the first of them: '.*a\.tar/0'"):
        source(tmp_path / "a.tar", num_classes=0, max_skipped=1.0).check()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jpg", encoded(1, "jpeg")[:-60], "[Tt]runcated"),
        ("a.png", encoded(1)[:-30], r"truncated|broken"),
        (
            "a.jpg",
            encoded(1, "jpeg", size=4),
            r"has 4×4 pixels, too few for data\.image_size=8; set data\.image_size=4",
        ),
        ("a.tif", "I", r"PIL's mode I, .* 8 bits"),
        ("a.png", "bomb", "cannot be read as an image .*exceeds limit"),
        ("a.jpg", "bomb", "cannot be read as an image"),
    ],
)
def test_images_that_cannot_be_used_have_a_sentence_with_shard_and_key(tmp_path, name, data, sentence):
    if data == "I":
        file = io.BytesIO()
        Image.new("I", (8, 8)).save(file, "TIFF")
        data = file.getvalue()
    elif data == "bomb" and name == "a.png":
        plain = bytearray(encoded(1))
        plain[16:24] = (60000).to_bytes(4, "big") * 2
        plain[29:33] = zlib.crc32(bytes(plain[12:29])).to_bytes(4, "big")
        data = bytes(plain)
    elif data == "bomb":
        plain = bytearray(encoded(1, "jpeg"))
        at = plain.index(b"\xff\xc0") + 5
        plain[at : at + 4] = (60000).to_bytes(2, "big") * 2
        data = bytes(plain)
    write_members(tmp_path / "x.tar", [(name, data)])
    with pytest.raises(DiffxError, match=rf"'.*x\.tar/a' .*{sentence}") as error:
        source(tmp_path / "x.tar", num_classes=0, on_error="raise").split("train").get(torch.tensor([0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"holds uint8 \[8, 8, 3\], and images are uint8 \[3, 8, 8\]"),
        (np.zeros((3, 8, 8), np.float32), r"holds float32 \[3, 8, 8\]"),
        (np.zeros((3, 9, 8), np.uint8), r"holds uint8 \[3, 9, 8\]"),
        (None, "is no array of NumPy's format 1.0"),
    ],
)
def test_arrays_of_another_shape_are_named(tmp_path, array, sentence):
    file = io.BytesIO(b"nonsense" * 100)
    if array is not None:
        np.save(file, array)
    write_members(tmp_path / "a.tar", [("0.npy", encoded(0, "npy")), ("1.npy", file.getvalue())])
    with pytest.raises(DiffxError, match=rf"'.*a\.tar/1\.npy' {sentence}"):
        source(tmp_path / "a.tar", num_classes=0).check()


def test_arrays_beside_images_are_not_taken_for_them(tmp_path):
    embedding = io.BytesIO()
    np.save(embedding, np.zeros(512, np.float16))
    write_members(
        tmp_path / "a.tar", [("0.png", encoded(0)), ("0.npy", embedding.getvalue()), ("1.npy", encoded(1, "npy"))]
    )
    data = source(tmp_path / "a.tar", num_classes=0)
    assert numbers_of(data.split("train").get(torch.arange(2))["x"]) == [0, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_that_change_or_vanish_stop_the_run(uneven, num_workers):
    data = source(uneven, num_workers=num_workers)
    data.check()
    write_shard(uneven / "2.tar", range(8, 20), txt=lambda k: "grown")
    with pytest.raises(DiffxError, match=r"the shard '.*2\.tar' has changed since training started"):
        global_batches(data, 5)
    data = source(uneven, num_workers=num_workers)
    data.check()
    (uneven / "2.tar").unlink()
    with pytest.raises(DiffxError, match=r"the shard '.*2\.tar' cannot be opened any more \(No such file"):
        global_batches(data, 5)


def test_a_table_is_made_once_and_again_when_shards_change(uneven, monkeypatch):
    from diffx.data.shards import table

    made = []
    real = table.build_table
    monkeypatch.setattr(table, "build_table", lambda *rest: made.append(1) or real(*rest))
    for _ in range(2):
        source(uneven).check()
    assert made == [1]
    write_shard(uneven / "0.tar", range(5))
    assert len(source(uneven).split("train")) == 27 and made == [1, 1]
    write_shard(uneven / "9.tar", range(50, 53))
    assert len(source(uneven).split("train")) == 30
    source(uneven, num_classes=0).check()
    assert len(made) == 4


def test_a_truncated_tail_shard_trains_without_its_last_samples(uneven):
    whole = (uneven / "4.tar").read_bytes()
    index = index_shard(uneven / "4.tar")
    cut = int(index.part("png")[0][4]) + 10
    (uneven / "4.tar").write_bytes(whole[:cut])
    data = source(uneven)
    numbers = numbers_of(together(global_batches(data, 7), "x"))
    assert sorted(numbers[:27]) == list(range(27)) and "1 cut off" in data.describe()
    with pytest.raises(
        DiffxError, match=r"the end of '.*4\.tar' is missing; fetch or write it anew, or set data\.on_error"
    ):
        source(uneven, on_error="raise").check()


# ---- workers ----


class Faulty(Dataset):
    """Batches until something happens."""

    def __init__(self, what):
        self.what = what

    def __getitems__(self, samples):
        if samples[0] == 24 and self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if samples[0] == 24 and self.what == "complains":
            raise DiffxError("one clear sentence")
        return {"x": torch.full((len(samples), 2), samples[0])}


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("dies", r"a process that reads data has died( \(SIGKILL\))?, .*; lower data\.num_workers"),
        ("complains", "^one clear sentence$"),
    ],
)
def test_what_happens_in_a_worker_is_one_sentence(what, sentence):
    loader = StreamLoader(Faulty(what), GlobalBatches(8), workers=1)
    batches = iter(loader)
    with pytest.raises(DiffxError, match=sentence) as error:
        assert [int(next(batches)["x"][0, 0]) for _ in range(4)] == "four"
    assert "\n" not in str(error.value)


class Growing(Dataset):
    """Batches of changing sizes and types, not written where they are sent from."""

    def __getitems__(self, samples):
        n = samples[0] // 8
        return {"x": torch.full((1 + n % 5, 3), n, dtype=torch.float32), "flag": torch.tensor([n % 2 == 0])}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_of_any_shape_arrive_as_they_were_sent(workers):
    loader = StreamLoader(Growing(), GlobalBatches(8), workers)
    for _ in range(2):  # twice: the workers of the first time are gone
        for n, batch in enumerate(itertools.islice(loader, 30)):
            assert batch["x"].equal(torch.full((1 + n % 5, 3), n)) and batch["flag"].tolist() == [n % 2 == 0]
    assert loader.waited > 0


def test_too_little_shared_memory_is_said_before_training(uneven, monkeypatch):
    data = source(uneven, num_workers=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64, 63, 1))
    with pytest.raises(
        DiffxError, match=r"2 workers need .* MiB of shared memory and 0 are free .*lower data\.num_workers"
    ):
        data.train_loader(0)
    source(uneven).train_loader(0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"channels": 2}, r"data\.channels is 2; images in shards"),
        ({"test_fraction": 1.0}, r"data\.test_fraction is 1\.0"),
        ({"random_crop": 0.0}, r"data\.random_crop is 0\.0"),
        ({"max_skipped": 2.0}, r"data\.max_skipped is 2\.0"),
        ({"shuffle_shards": -1}, r"data\.shuffle_shards is -1"),
        ({"on_error": "skp"}, r"data\.on_error is 'skp' \(did you mean 'skip'\?\)"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, sentence):
    with pytest.raises(DiffxError, match=sentence):
        source("x.tar", **changes)


# ---- remote shards ----


def test_shards_from_commands_are_copied_once_and_read_like_others(uneven, tmp_path):
    expected = global_batches(source(uneven), 8)
    for index in uneven.glob("*.npz"):
        index.unlink()
    log = tmp_path / "log"
    shards = [f"pipe:cat {uneven}/{k}.tar && echo {k} >> {log}" for k in range(5)]
    with pytest.raises(
        DiffxError, match=r"has no index '.*0\.tar\.index\.npz && echo 0.*' beside it, .*data\.count_ahead=true"
    ):
        source(shards).check()
    data = source(shards, count_ahead=True)
    data.check()
    batches = global_batches(data, 8)
    # the order of the shards is drawn by their places in the list
    assert_same(batches, expected)
    assert sorted(log.read_text().split()) == list("01234")
    again = source(shards)
    again.check()
    assert_same(global_batches(again, 8, world_size=2), expected)
    assert len(log.read_text().split()) == 5


def test_indexes_beside_remote_shards_spare_the_count(uneven, monkeypatch):
    expected = global_batches(source(uneven), 8)  # leaves the indexes behind
    shards = [f"pipe:cat {uneven}/{k}.tar" for k in range(5)]
    monkeypatch.setenv("DIFFX_CACHE", str(uneven / "cache"))
    data = source(shards, num_workers=2)
    data.check()
    assert not list((uneven / "cache").rglob("*.tar"))
    assert_same(global_batches(data, 8), expected)
    assert len(list((uneven / "cache").rglob("*.tar"))) == 5
    with pytest.raises(
        DiffxError, match=r"must be read before training, and it is not on this machine; set data\.count_ahead"
    ):
        source(shards, filter="width>3").check()


def test_the_cache_of_copies_stays_bounded(uneven):
    shards = [f"pipe:cat {uneven}/{k}.tar" for k in range(5)]
    open_all = source(uneven)
    open_all.check()
    sizes = sorted((uneven / f"{k}.tar").stat().st_size for k in range(5))
    data = source(shards, shuffle_shards=1, cache_bytes=sum(sizes[-2:]))
    data.check()
    folder = Path(os.environ["DIFFX_CACHE"]) / "shards" / "fetched"
    expected = global_batches(source(uneven, shuffle_shards=1), 12)
    loader = iter(data.train_loader(3))
    for batch in expected:
        assert_same([next(loader)], [batch])
        # what is being fetched right now may come on top
        assert sum(file.stat().st_size for file in folder.glob("[!.]*.tar")) <= sum(sizes[-2:]) + sizes[-1]
    with pytest.raises(
        DiffxError, match=r"two windows of 1 remote shards take up to [\d,]+ bytes, .*raise it, or lower"
    ):
        source(shards, shuffle_shards=1, cache_bytes=sizes[-1]).check()


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [
        ("pipe:cat {0}/nowhere.tar", r"'pipe:cat .*nowhere\.tar' cannot be fetched"),
        ("pipe:true {0}/0.tar", r"came with 0 bytes; check the shard"),
        ("s3://bucket/0.tar", r"'s3://bucket/0\.tar' is of a kind that cannot be fetched .*pipe:aws s3 cp"),
        ("pipe:head -c 700 {0}/2.tar", "the train split .* has no images, 1 cut off"),
    ],
)
def test_remote_shards_that_cannot_be_fetched(uneven, shard, sentence):
    data = source([shard.format(uneven)], count_ahead=True, num_classes=0)
    with pytest.raises(DiffxError, match=sentence) as error:
        data.check()
    assert "\n" not in str(error.value)
    assert not list(Path(os.environ["DIFFX_CACHE"]).rglob(".*tmp*"))


def test_a_remote_shard_that_has_changed_is_refused(uneven, tmp_path):
    shutil.copytree(uneven, tmp_path / "far")
    shards = [f"pipe:cat {tmp_path}/far/{k}.tar" for k in range(5)]
    source(shards, count_ahead=True).check()
    shutil.rmtree(Path(os.environ["DIFFX_CACHE"]) / "shards" / "fetched")
    write_shard(tmp_path / "far" / "2.tar", range(60))
    with pytest.raises(DiffxError, match=r"2\.tar' came with [\d,]+ bytes instead of [\d,]+; check the shard"):
        global_batches(source(shards), 8)


# ---- many ranks ----


def imagined(folder, shards, most):
    """Index files of uneven shards whose contents are holes."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for k in range(shards):
        n = int(draw.integers(1, most))
        path = folder / f"{k:05d}.tar"
        with path.open("wb") as hole:
            hole.truncate(1024 * n)
        place = 1024 * np.arange(n, dtype=np.int64)[:, None] + 512
        keys = np.frombuffer(b"".join(b"%06d" % i for i in range(n)), np.uint8)
        status = path.stat()
        save_index(
            ShardIndex(
                str(path), status.st_size, status.st_mtime_ns, "0" * 32, True, ("png",), keys, 6 * np.arange(1, n + 1),
                place, np.full((n, 1), 100),
            )
        )  # fmt: skip


def test_a_thousand_ranks_share_every_pass_evenly(tmp_path):
    imagined(tmp_path / "many", 100, 1200)
    ranks, workers = 1024, 8
    data = source(tmp_path / "many", num_classes=0, batch_size=2 * ranks, shuffle_shards=64)
    order, _ = data.order(0)
    total = len(data.split("train"))
    seen = torch.zeros(total, dtype=torch.int64)
    load = torch.zeros(ranks, workers, dtype=torch.int64)
    loaders = [iter(GlobalBatches(2 * ranks, 0, rank, ranks)) for rank in range(ranks)]
    for step in range(-(-total // (2 * ranks))):
        chunks = [next(loader) for loader in loaders]
        rows = order.rows(torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks]))
        mine = rows.reshape(ranks, 2)
        load[:, step % workers] += 2
        valid = torch.stack([torch.arange(chunk.start, chunk.stop) for chunk in chunks]) < total
        seen += torch.bincount(mine[valid], minlength=total)
    assert total > 50_000 and (seen == 1).all()
    assert load.sum(1).unique().numel() == 1 and load.max() - load.min() <= 2


def test_web_dataset_is_a_data_source():
    assert isinstance(source("x.tar"), DataSource)
