"""Packing: the same bytes whoever writes them and however often he is interrupted; every bad input in one sentence."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffx.cli import main as cli
from diffx.data.decode import read_image
from diffx.data.pack import (
    ArraySource,
    Interrupted,
    Layout,
    Manifest,
    ParquetSource,
    Sample,
    ShardSource,
    Transform,
    data_splits,
    pack,
    splits_of,
)
from diffx.data.pack import writer as writer_module
from diffx.data.pack.find import Names
from diffx.data.pack.inspect import inspect
from diffx.data.pack.processes import each
from diffx.utils import DiffxError

N = 23


def picture(i, size=(12, 10), mode="RGB"):
    """Image i: a gradient and a colour of its own."""
    x = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(x + np.uint8(2 * i)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """23 images in three classes, PNG and JPEG, of two sizes; one with a caption, one with JSON."""
    root = tmp_path / "photos"
    for i in range(N):
        folder = root / ("cat", "dog", "eel")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i, (12, 10) if i % 2 else (9, 15)).save(folder / f"im.{i:02d}.{'png' if i % 4 else 'jpg'}")
    (root / "cat/im.00.txt").write_text("a grey cat")
    (root / "dog/im.01.json").write_text('{"licence": "cc0"}')
    (root / "dog/notes.md").write_text("no image")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))


def packed(source, dest, transform=None, **layout):
    options = {key: layout.pop(key) for key in ("workers", "broken", "stop") if key in layout}
    split = splits_of(str(source))[""] if isinstance(source, str | Path) else source
    return pack(split, dest, transform or Transform(), Layout(**{"shard_size": 5, **layout}), **options)


def tars(folder):
    """The bytes of each shard by its name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def samples(folder):
    """The parts of each sample by key, in the order of the shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                head, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                found.setdefault(f"{head}/{stem}" if head else stem, {})[extension] = file.read()
    return found


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def run(capsys, *argv):
    """Exit code, stdout and stderr of `diffx data …`, in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", *map(str, argv)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def sentence(error):
    """The message of an error, which is one sentence."""
    text = str(error.value)
    assert "\n" not in text and text
    return text


# ----- what is packed


def test_files_that_nothing_changes_about_are_kept_byte_by_byte(photos, tmp_path):
    manifest = packed(photos, tmp_path / "out")
    found = samples(tmp_path / "out")
    assert len(found) == N == manifest.count
    for path in photos.rglob("im.*.[pj]*g"):
        key = f"{path.parent.name}/{path.stem.replace('.', '_')}"
        assert found[key][path.suffix[1:]] == path.read_bytes(), key
        assert found[key]["cls"] == str(["cat", "dog", "eel"].index(path.parent.name)).encode()
    assert found["cat/im_00"]["txt"] == b"a grey cat"
    assert found["dog/im_01"]["json"] == b'{"licence": "cc0"}'
    assert not any("md" in parts for parts in found.values())


def test_the_manifest_tells_what_is_there(photos, tmp_path):
    packed(photos, tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.count, manifest.num_classes, manifest.class_names) == (N, 3, ("cat", "dog", "eel"))
    assert manifest.class_counts == [8, 8, 7]
    assert manifest.parts == {"cls": N, "jpg": 6, "json": 1, "png": N - 6, "txt": 1}
    assert manifest.sizes == {"15x9": 12, "10x12": 11}
    assert [shard.count for shard in manifest.shards] == [5, 5, 5, 5, 3]
    assert manifest.settings["shard_size"] == 5 and manifest.settings["filter"] == "adm"
    assert manifest.source["path"] == str(photos)
    for shard in manifest.shards:
        path = tmp_path / "out" / shard.name
        assert path.stat().st_size == shard.bytes
        assert (path.parent / f"{path.name}.index.npz").is_file()
        assert writer_module.verify(tmp_path / "out", shard) == ""
    said = json.loads((tmp_path / "out/manifest.json").read_text())
    assert said["fingerprint"] == manifest.fingerprint()


@pytest.mark.parametrize("name", ["adm", "box", "bilinear", "bicubic", "lanczos"])
def test_images_are_scaled_by_the_named_filter_and_cropped_at_the_centre(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    stored = Transform(image_size=8, filter=name)(Sample("x", buffer.getvalue()))
    found = np.asarray(Image.open(io.BytesIO(stored.data)))
    if name == "adm":
        expected = image.resize((15, 20), Image.Resampling.BOX).resize((8, 11), Image.Resampling.BICUBIC)
    else:
        expected = image.resize((8, 11), Image.Resampling[name.upper()])
    assert np.array_equal(found, np.asarray(expected)[1:9])
    assert stored.extension == "png" and (stored.height, stored.width) == (8, 8)


def test_what_is_packed_in_a_size_is_what_would_be_read_in_it(photos, tmp_path):
    packed(photos, tmp_path / "out", Transform(image_size=8))
    for path in photos.rglob("im.*.[pj]*g"):
        parts = samples(tmp_path / "out")[f"{path.parent.name}/{path.stem.replace('.', '_')}"]
        pixels = np.asarray(Image.open(io.BytesIO(parts["png"]))).transpose(2, 0, 1)
        assert np.array_equal(pixels, read_image(path, 3, 8, False))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "npy"])
def test_formats(kind):
    pixels = np.full((6, 6, 3), 90, np.uint8)
    pixels[2:, :, 0] = 200
    stored = Transform(image_size=6, format=kind)(Sample("x", pixels))
    assert stored.extension == kind
    if kind == "npy":
        assert np.array_equal(np.load(io.BytesIO(stored.data)), pixels.transpose(2, 0, 1))
        return
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
    assert np.abs(np.asarray(image).astype(int) - pixels).max() <= (16 if kind == "jpg" else 0)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


ODD = {
    "16-bit": (saved(Image.fromarray(np.full((8, 8), 40000, np.uint16)), "PNG"), "L"),
    "cmyk": (saved(picture(1, (8, 8)).convert("CMYK"), "JPEG"), "RGB"),
    "palette": (saved(picture(1, (8, 8)).convert("P"), "PNG"), "RGB"),
    "alpha": (saved(picture(1, (8, 8)).convert("RGBA"), "PNG"), "RGB"),
    "grey": (saved(picture(1, (8, 8)).convert("L"), "PNG"), "L"),
    "bilevel": (saved(picture(1, (8, 8)).convert("1"), "PNG"), "L"),
    "animated": (
        saved(picture(1, (8, 8)), "WEBP", save_all=True, append_images=[picture(9, (8, 8))], lossless=True),
        "RGB",
    ),
    "turned": (
        saved(
            picture(1, (8, 10)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        ),
        "RGB",
    ),
    "bmp": (saved(picture(1, (8, 8)), "BMP"), "RGB"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_modes_are_kept_or_become_plain(odd):
    data, mode = ODD[odd]
    kept = Transform()(Sample("x", data))
    if odd not in ("animated", "bmp"):
        assert kept.data == data
    small = Transform(image_size=4)(Sample("x", data))
    image = Image.open(io.BytesIO(small.data))
    assert (image.mode, image.size, getattr(image, "n_frames", 1)) == (mode, (4, 4), 1)
    coloured = Image.open(io.BytesIO(Transform(image_size=4, channels=3)(Sample("x", data)).data))
    assert coloured.mode == "RGB"
    if odd == "16-bit":
        assert np.asarray(image).max() == 156
    if odd == "turned":
        assert (kept.height, kept.width) == (8, 10)


def test_a_wrong_suffix_does_not_matter():
    assert Transform()(Sample("x.jpg", saved(picture(0), "PNG"))).extension == "png"


# ----- sources


def test_numpy_arrays(tmp_path):
    images, labels = np.arange(4 * 6 * 6, dtype=np.uint8).reshape(4, 6, 6), np.array([1, 0, 2, 1])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", arr_0=np.stack([images] * 3, 1), arr_1=labels[:, None])
    np.savez(tmp_path / "c.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    np.savez(tmp_path / "d.npz", pixels=images, kinds=labels)
    assert [splits_of(str(tmp_path / "a.npz"))[""].read(i).label for i in range(4)] == labels.tolist()
    b = splits_of(str(tmp_path / "b.npz"))[""].read(1)
    assert np.array_equal(b.image, np.stack([images[1]] * 3, -1)) and b.label == 0
    assert {name: len(split) for name, split in splits_of(str(tmp_path / "c.npz")).items()} == {"train": 4, "test": 2}
    with pytest.raises(DiffxError, match=r"no array of images .* only pixels, kinds; set image_key=NAME"):
        splits_of(str(tmp_path / "d.npz"))
    d = splits_of(str(tmp_path / "d.npz"), names=Names("pixels", "kinds"))[""]
    assert d.read(2).label == 2
    packed(d, tmp_path / "out")
    assert [parts["cls"] for _, parts in sorted(samples(tmp_path / "out").items())] == [b"1", b"0", b"2", b"1"]


def test_idx_files(tmp_path):
    import struct

    for prefix, count in (("train", 5), ("t10k", 3)):
        pixels = np.arange(count * 16, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">HBBIII", 0, 8, 3, count, 4, 4) + bytes(pixels)
        )
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">HBBI", 0, 8, 1, count) + bytes(range(count))
        )
    found = splits_of(str(tmp_path))
    assert {name: len(split) for name, split in found.items()} == {"train": 5, "test": 3}
    assert found["train"].read(4).label == 4
    assert found["train"].read(1).image[0, 0, 0] == 16


def test_data_sets_that_diffx_knows(tmp_path):
    from diffx.data import Digits

    source = Digits(name="digits", channels=1, image_size=8, num_classes=10, batch_size=8, flip=False, num_workers=0)
    found = data_splits(source)
    assert {name: len(split) for name, split in found.items()} == {"train": 1437, "test": 360}
    manifest = packed(found["test"], tmp_path / "out", shard_size=200)
    assert manifest.class_names == tuple("0123456789") and sum(manifest.class_counts) == 360
    again = inspect(ShardSource([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]))
    test = source.split("test").get(torch.arange(360))["x"].double()
    assert again.moments()[1][0][0] == pytest.approx(test.mean().item())
    assert again.moments()[1][1][0] == pytest.approx(test.std(correction=0).item())


def test_shards_packed_again_keep_keys_labels_names_and_texts(photos, tmp_path):
    first = packed(photos, tmp_path / "one")
    second = packed(tmp_path / "one", tmp_path / "two", Transform(image_size=6), shard_size=7, seed=1)
    assert second.class_names == first.class_names and second.class_counts == first.class_counts
    one, two = samples(tmp_path / "one"), samples(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        assert {k: v for k, v in one[key].items() if k in ("cls", "txt", "json")} == {
            k: v for k, v in two[key].items() if k in ("cls", "txt", "json")
        }


def test_splits_get_folders(photos, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    photos.rename(tmp_path / "both/train")
    for name in ("cat", "dog", "eel"):
        (tmp_path / "both/val" / name).mkdir(parents=True)
        picture(3).save(tmp_path / "both/val" / name / "x.png")
    code, out, _ = run(capsys, "pack", tmp_path / "both", tmp_path / "out")
    assert code == 0
    assert Manifest.load(tmp_path / "out/train").count == N
    assert Manifest.load(tmp_path / "out/test").count == 3
    assert f"data.shards={tmp_path}/out/train data.test_shards={tmp_path}/out/test" in out
    assert set(splits_of(str(tmp_path / "out"))) == {"train", "test"}
    # again: done, and no other file is touched
    before = tars(tmp_path / "out/train")
    assert run(capsys, "pack", tmp_path / "both", tmp_path / "out")[0] == 0
    assert tars(tmp_path / "out/train") == before


def test_parquet_files_as_hugging_face_writes_them(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": saved(picture(i), "PNG"), "path": f"{i}.png"} for i in range(N)]
    info = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = arrow.table({"image": images, "label": [i % 2 for i in range(N)], "text": [f"no. {i}" for i in range(N)]})
    table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    (tmp_path / "data").mkdir()
    parquet.write_table(table.slice(0, 14), tmp_path / "data/train-00000-of-00002.parquet", row_group_size=4)
    parquet.write_table(table.slice(14), tmp_path / "data/train-00001-of-00002.parquet", row_group_size=4)
    source = splits_of(str(tmp_path))["train"]
    assert isinstance(source, ParquetSource) and source.class_names == ("a", "b") and len(source) == N
    sample = source.read(17)
    assert (sample.image, sample.label, sample.extras) == (images[17]["bytes"], 1, {"txt": b"no. 17"})
    one = packed(source, tmp_path / "one", workers=1)
    two = packed(splits_of(str(tmp_path))["train"], tmp_path / "two", workers=2)
    assert one == two and tars(tmp_path / "one") == tars(tmp_path / "two")
    assert len(samples(tmp_path / "one")) == N
    with pytest.raises(DiffxError, match="no column 'labels'"):
        splits_of(str(tmp_path), names=Names(label="labels"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DiffxError) as error:
        splits_of(str(tmp_path / "a.parquet"))
    assert "pip install 'diffx[parquet]'" in sentence(error)


# ----- shuffling and sizes


def test_shuffling_mixes_classes_and_loses_nothing(photos, tmp_path):
    packed(photos, tmp_path / "sorted", shuffle=False)
    packed(photos, tmp_path / "one", seed=1)
    packed(photos, tmp_path / "two", seed=2)
    orders = [[*samples(tmp_path / name)] for name in ("sorted", "one", "two")]
    assert orders[0] == sorted(orders[0])
    assert sorted(orders[1]) == sorted(orders[2]) == orders[0]
    assert len({tuple(order) for order in orders}) == 3
    first = [parts["cls"] for parts in samples(tmp_path / "one").values()][:5]
    assert len(set(first)) > 1


@pytest.mark.parametrize("size", ["80kB", "0.08MB", "80 KB"])
def test_a_size_in_bytes_is_about_the_size_of_the_shards(size, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    manifest = packed(ArraySource("noise", noise, None), tmp_path / "out", shard_size=size)
    assert all(70_000 < shard.bytes < 95_000 for shard in manifest.shards[:-1]) and len(manifest.shards) > 1


# ----- the same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(photos, tmp_path, workers):
    one = packed(photos, tmp_path / "one", Transform(image_size=8))
    many = packed(photos, tmp_path / "many", Transform(image_size=8), workers=workers)
    assert one == many
    assert tars(tmp_path / "one") == tars(tmp_path / "many")
    assert files_below(tmp_path / "many") == files_below(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 2])
def test_stopping_at_any_sample_and_going_on_gives_the_same_bytes(photos, tmp_path, workers):
    packed(photos, tmp_path / "whole")
    for after in (1, 6, 14):
        asked = iter([False] * after + [True] * 1000)
        dest = tmp_path / f"after{after}"
        # several processes may be done before they are asked
        try:
            packed(photos, dest, workers=workers, stop=lambda asked=asked: next(asked))
        except Interrupted as interrupted:
            assert "run the same command again" in str(interrupted)
            assert not tars(dest) and not (dest / "manifest.json").exists()
            with pytest.raises(DiffxError, match="has no manifest"):
                Manifest.load(dest)
        packed(photos, dest)
        assert tars(dest) == tars(tmp_path / "whole")
        assert files_below(dest) == files_below(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from diffx.data.pack import Layout, Transform, pack, splits_of
def on_sample(done, total):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
workers = int(sys.argv[4])
pack(splits_of(sys.argv[1])[""], Path(sys.argv[2]), Transform(), Layout(5), workers=workers, on_sample=on_sample)
"""


@pytest.mark.parametrize(("after", "workers"), [(8, 1), (17, 1), (1, 2)])
def test_killing_loses_unfinished_shards_only_and_leaves_no_processes(photos, tmp_path, after, workers):
    packed(photos, tmp_path / "whole")
    dest = tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, photos, dest, str(after), str(workers)]
    # the workers hold the pipe as long as they live: this returns when all are gone
    result = subprocess.run(list(map(str, argv)), check=False, stdout=subprocess.PIPE)
    assert result.returncode == -signal.SIGKILL
    assert not tars(dest) and not (dest / "manifest.json").exists()
    finished = {path.name for path in (dest / "unfinished").glob("*.tar") if not path.name.startswith(".")}
    if workers == 1:
        assert len(finished) == (after - 1) // 5
        assert any(path.name.startswith(".") and path.suffix == ".tar" for path in (dest / "unfinished").iterdir())
    times = {name: (dest / "unfinished" / name).stat().st_mtime_ns for name in finished}
    packed(photos, dest, workers=2)
    assert tars(dest) == tars(tmp_path / "whole")
    assert files_below(dest) == files_below(tmp_path / "whole")
    if (
        workers == 1
    ):  # the second of two may have been killed between a shard and its index: then both are written again
        assert all((dest / name).stat().st_mtime_ns == time for name, time in times.items())


@pytest.mark.parametrize("moves", [0, 3, 10])
def test_being_killed_while_the_shards_are_moved_up_loses_nothing(photos, tmp_path, monkeypatch, moves):
    packed(photos, tmp_path / "whole")
    replace, done = Path.replace, []

    def dying(self, target):
        if "unfinished" in self.parent.name and Path(target).parent.name == "out":
            done.append(target)
            if len(done) > moves:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    # after ten moves, of five shards with an index each, the manifest is what remains
    monkeypatch.setattr(Manifest, "save", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        packed(photos, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(done) == min(moves + 1, 10)
    monkeypatch.undo()
    packed(photos, tmp_path / "out", workers=2)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(photos, tmp_path, monkeypatch):
    packed(photos, tmp_path / "whole")
    write, written = writer_module._Hashed.write, []

    def full(self, data):
        written.append(len(data))
        if sum(written) > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(writer_module._Hashed, "write", full)
    with pytest.raises(DiffxError) as error:
        packed(photos, tmp_path / "out")
    text = sentence(error)
    assert "No space left on device" in text and "of 5 shards are finished and kept" in text
    kept = {path.name for path in (tmp_path / "out/unfinished").glob("[0-9]*.tar")}
    assert kept and not tars(tmp_path / "out")
    monkeypatch.undo()
    packed(photos, tmp_path / "out")
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")


def test_two_at_a_time_are_refused(photos, tmp_path):
    from diffx.data.pack.writer import Staging

    staging = Staging(tmp_path / "out", ["000000.tar"], {})
    with staging.lock(), pytest.raises(DiffxError, match="another process is writing"), staging.lock():
        pass


def dies(i, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_process_is_one_sentence():
    with pytest.raises(DiffxError, match=r"a process has died.*set workers to a smaller number"):
        list(each(dies, range(4), 2))


# ----- bad input


def test_another_command_for_the_same_folder_is_refused(photos, tmp_path):
    stop = iter([False] * 7 + [True] * 99)
    with pytest.raises(Interrupted):
        packed(photos, tmp_path / "out", stop=lambda: next(stop))
    for change in ({"shard_size": 6}, {"seed": 1}, {"transform": Transform(image_size=4)}):
        with pytest.raises(DiffxError) as error:
            packed(photos, tmp_path / "out", **change)
        assert "is of other settings" in sentence(error)
    packed(photos, tmp_path / "out")
    picture(1).save(photos / "cat/new.png")
    with pytest.raises(DiffxError, match="is of other samples"):
        packed(photos, tmp_path / "out")


def test_a_folder_that_is_not_ours_is_left_alone(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(DiffxError, match="is no folder of shards begun by diffx"):
        packed(photos, tmp_path / "out")
    assert files_below(tmp_path / "out") == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiffxError, match="is no folder of shards begun by diffx"):
        packed(photos, tmp_path / "file")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_image_stops_or_is_skipped(photos, tmp_path, workers):
    bad = photos / "dog/im.04.jpg"
    bad.write_bytes(bad.read_bytes()[:-60])
    with pytest.raises(DiffxError) as error:
        packed(photos, tmp_path / "out", workers=workers)
    assert "dog/im.04.jpg" in sentence(error) and "broken=skip" in str(error.value)
    manifest = packed(photos, tmp_path / "out", workers=workers, broken="skip")
    assert manifest.count == N - 1
    assert list(manifest.skipped) == ["dog/im_04"] and "cannot be read" in manifest.skipped["dog/im_04"]
    assert "dog/im_04" not in samples(tmp_path / "out")


def test_shards_of_nothing_but_broken_images_are_left_out(photos, tmp_path):
    for path in photos.rglob("im.*.[pj]*g"):
        path.write_bytes(b"nothing")
    picture(1).save(photos / "cat/im.00.jpg")
    manifest = packed(photos, tmp_path / "out", broken="skip")
    assert manifest.count == 1 and len(manifest.shards) == len(tars(tmp_path / "out")) == 1
    (photos / "cat/im.00.jpg").write_bytes(b"nothing")
    with pytest.raises(DiffxError, match=r"no sample of .* can be read"):
        packed(photos, tmp_path / "none", broken="skip")


def test_duplicate_keys_are_refused_or_numbered(photos, tmp_path):
    picture(1).save(photos / "cat/im_00.png")
    with pytest.raises(DiffxError) as error:
        packed(photos, tmp_path / "out")
    assert "two samples of the key 'cat/im_00'" in sentence(error) and "keys=numbers" in str(error.value)
    manifest = packed(photos, tmp_path / "out", keys="numbers")
    assert manifest.count == N + 1 and "000000" in samples(tmp_path / "out")


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_keys_that_repeat_from_shard_to_shard(tmp_path):
    for i in range(2):
        (tmp_path / "old").mkdir(exist_ok=True)
        shard(tmp_path / f"old/{i}.tar", ("0.png", saved(picture(i), "PNG")), ("0.cls", b"1"))
    with pytest.raises(DiffxError, match="two samples of the key '0'"):
        packed(tmp_path / "old", tmp_path / "out")
    assert packed(tmp_path / "old", tmp_path / "out", keys="numbers").count == 2


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", saved(picture(1), "PNG")), ("a.cls", b"-3")], "has the label -3"),
        ([("a.png", saved(picture(1), "PNG")), ("a.cls", b"9")], "has the label 9, but classes are 0..8"),
        ([("a.png", saved(picture(1), "PNG")), ("a.cls", b"cat")], "no whole number"),
        ([("a.txt", b"no image")], "has no image"),
        ([("a.npy", saved(picture(1), "PNG"))], "holds no array"),
    ],
)
def test_bad_shards(tmp_path, members, said):
    (tmp_path / "old").mkdir()
    shard(tmp_path / "old/0.tar", *members)
    with pytest.raises(DiffxError, match=said) as error:
        packed(tmp_path / "old", tmp_path / "out", num_classes=9)
    assert str(tmp_path / "old/0.tar: a") in sentence(error)


def test_a_shard_that_is_cut_off(photos, tmp_path):
    packed(photos, tmp_path / "one", shard_size=100)
    path = tmp_path / "one/000000.tar"
    path.write_bytes(path.read_bytes()[:-14000])
    (tmp_path / "one/000000.tar.index.npz").unlink()
    with pytest.raises(DiffxError, match=r"the end of the shard .* is missing"):
        splits_of(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((3, 4, 4), np.float32), None, "holds float32"),
        (np.zeros((3, 5, 4, 5), np.uint8), None, "of 1, 3 or 4 channels"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0, 1]), "3 images, but labels of int64"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0, -1, 1]), "has the label -1"),
    ],
)
def test_bad_arrays(images, labels, said):
    with pytest.raises(DiffxError, match=said):
        ArraySource("these", images, labels)


def test_labels_beyond_the_names():
    with pytest.raises(DiffxError, match=r"has the label 2, but classes are 0..1"):
        ArraySource("these", np.zeros((1, 2, 2), np.uint8), np.array([2]), ("a", "b"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere", "out"), "there is no folder or file 'nowhere'"),
        (("nowhere.npz", "out"), "there is no file 'nowhere.npz'"),
        (("photos",), "say what and where to"),
        (("photos", "photos/packed"), "would be packed too"),
        (("photos", "out", "shard_size=0"), "shard_size=0 must be at least 1"),
        (("photos", "out", "shard_size=big"), "shard_size=big is neither samples"),
        (("photos", "out", "filter=nearest"), "filter=nearest is none of adm, box"),
        (("photos", "out", "format=gif"), "format=gif is none of null, jpg"),
        (("photos", "out", "format=npy"), "set image_size too"),
        (("photos", "out", "image_size=0"), "image_size must be at least 1"),
        (("photos", "out", "image_sise=8"), "did you mean 'image_size'"),
        (("photos", "out", "channels=2"), "channels=2 is none of null, 1, 3"),
        (("photos", "out", "image_size=64"), "too few for image_size=64; set image_size=10 or less, set upscale=true"),
        (("photos", "out", "keys=hash"), "keys=hash is neither names nor numbers"),
        (("photos", "out", "broken=ignore"), "broken must be stop or skip"),
        (("photos", "out", "num_classes=2"), "num_classes=2, but .* has 3 classes"),
        (("photos", "out", "workers=0"), "workers must be at least 1"),
        (("out", "data=digits", "data.image_size=9"), "data.image_size is 9"),
    ],
)
def test_mistakes_on_the_command_line(photos, tmp_path, monkeypatch, capsys, words, said):
    import re

    monkeypatch.chdir(tmp_path)
    if "image_size=64" in words:
        picture(1, (12, 10)).save(photos / "cat/im.00.jpg")
    before = files_below(photos)
    code, _, err = run(capsys, "pack", *words)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert re.search(said, err), err
    assert files_below(photos) == before and not tars(tmp_path / "out")


def test_unknown_subcommands_and_help(capsys):
    code, _, err = run(capsys, "pakc")
    assert code == 2 and "did you mean 'pack'" in err
    for words in (["--help"], ["pack", "--help"], ["inspect", "--help"], ["encode", "--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0 and "examples:" in out and f"diffx data {words[0]}".removesuffix(" --help") in out


def test_mixed_folders_and_empty_classes_are_told_in_own_words(photos, tmp_path):
    picture(1).save(photos / "loose.png")
    with pytest.raises(DiffxError) as error:
        splits_of(str(photos))
    assert "classes=false" in sentence(error) and "data." not in str(error.value)
    assert splits_of(str(photos), labels=False)[""].read(0).label is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffxError) as error:
        splits_of(str(tmp_path / "empty"))
    assert "SOURCE" in sentence(error)


# ----- looking at them


def test_inspecting_good_shards(photos, tmp_path, capsys):
    packed(photos, tmp_path / "out", Transform(image_size=8))
    code, out, _ = run(capsys, "inspect", tmp_path / "out", f"out={tmp_path}/grid.png", "checksums=true", "n=12")
    assert code == 0
    for said in ("23 samples, 3 classes", "8x8 (23)", "RGB (23)", "checksums   all agree", "broken      0 samples"):
        assert said in out, said
    assert "classes     3, of 7 to 8 samples" in out and "from above: cat, dog, eel" in out
    with Image.open(tmp_path / "grid.png") as image:
        columns, rows = 4, 3
        assert image.width * (rows * 9 + 1) == image.height * (columns * 9 + 1)


def test_inspection_agrees_with_numpy_and_with_itself_for_any_number_of_processes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["diffx.data.pack.inspect"], "_CHUNK", 4)
    packed(photos, tmp_path / "out", Transform(image_size=8))
    source = splits_of(str(tmp_path / "out"))[""]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(p["png"]))) for p in samples(tmp_path / "out").values()])
    one = inspect(source)
    mean, std = one.moments()[3]
    assert np.allclose(mean, pixels.reshape(-1, 3).mean(0)) and np.allclose(std, pixels.reshape(-1, 3).std(0))
    assert one.classes == Counter({0: 8, 1: 8, 2: 7})
    many = inspect(source, workers=2)
    assert (many.classes, many.sizes, many.modes, many.moments()) == (one.classes, one.sizes, one.modes, one.moments())


def test_inspecting_names_broken_samples_by_shard_and_key(photos, tmp_path, capsys):
    packed(photos, tmp_path / "out")
    parts = samples(tmp_path / "out")
    path = tmp_path / "out/000001.tar"
    data = bytearray(path.read_bytes())
    key = list(parts)[6]
    image = next(parts[key][kind] for kind in ("png", "jpg") if kind in parts[key])
    at = bytes(data).index(image)
    data[at : at + len(image)] = bytes(len(image))
    path.write_bytes(data)
    code, out, _ = run(capsys, "inspect", tmp_path / "out", "checksums=true")
    assert code == 1
    assert f"000001.tar: {key}' cannot be read" in out and "broken      1 samples" in out
    assert "checksums   1 of 5 differ" in out and "000001.tar' has the sha256" in out


def test_inspecting_a_folder_of_mixed_images(photos, tmp_path, capsys):
    for i, (data, _) in enumerate(ODD.values()):
        (photos / f"eel/odd{i}.png").write_bytes(data)
    (photos / "eel/cut.jpg").write_bytes(ODD["cmyk"][0][:-80])
    code, out, _ = run(capsys, "inspect", photos, f"out={tmp_path}/grid.png")
    assert code == 1 and "CMYK (1)" in out and "I;16 (1)" in out and "eel/cut.jpg" in out
    assert (tmp_path / "grid.png").is_file()


def test_a_manifest_that_was_changed_is_refused(photos, tmp_path):
    packed(photos, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(DiffxError, match="has been changed by hand"):
        Manifest.load(tmp_path / "out")


def test_the_streaming_reader_reads_what_was_packed(photos, tmp_path):
    from diffx.data import WebDataset

    packed(photos, tmp_path / "out", Transform(image_size=8))
    settings = {"name": "w", "channels": 3, "image_size": 8, "num_classes": 3, "batch_size": N, "flip": False}
    source = WebDataset(shards=str(tmp_path / "out"), test_fraction=0.0, num_workers=0, **settings)
    source.check()
    batch = next(iter(source.train_loader(0)))
    expected = Counter(read_image(path, 3, 8, False).tobytes() for path in photos.rglob("im.*.[pj]*g"))
    assert Counter(x.numpy().tobytes() for x in batch["x"]) == expected
    assert batch["label"].bincount().tolist() == [8, 8, 7]
