"""Shards made once of any source: what is in them, what goes wrong, and going on after it."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from saved import REPO
from test_data_sources import Numbered, encode, everything, picture, write

from mim_jax.config import ConfigError
from mim_jax.data import manifest, pipeline, shard_writer
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.source import ArraySource
from mim_jax.data.sources import open_source
from mim_jax.jobs.preparation import Asked, prepare
from mim_jax.runs.lock import locked

N = 12


@pytest.fixture
def data(tmp_path):
    """A folder of two classes; every third image is larger than the others."""
    for k in range(N):
        sides = (80, 96) if k % 3 == 0 else (40, 48)
        write(f"{tmp_path}/data/{'ab'[k // 6]}/{k:02d}.jpg", encode(picture(k, *sides), "JPEG"))
    return tmp_path / "data"


def made(data, out, split="train", source="folder", **options):
    opening = dict(name=source, split=split, path=str(data))
    return prepare(Asked(opening, str(out), **{"shards": 3, **options}))


def stored(out, split="train", **options):
    """-> the encoded images of a prepared split."""
    source = open_source("prepared", split, path=str(out), **options)
    return [source.load(item)["image"].numpy() for item in source.lookup(tf.range(source.num_examples, dtype=tf.int64))]


def files_of(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*.jpg"))


# ---- what is in the shards


def test_bytes_are_untouched_and_tfds_reads_them(data, tmp_path):
    out = tmp_path / "out"
    said = made(data, out)
    assert stored(out) == [path.read_bytes() for path in files_of(data)]
    assert (said["examples"], said["examples_of_class"], said["resized"], said["skipped"]) == (N, {"a": 6, "b": 6}, 0, [])
    assert json.loads((out / "manifest-train.json").read_text()) == said
    source = open_source("prepared", "train", path=str(out))
    assert source.class_names == ("a", "b") and source.version == said["digest"]
    assert source.file_name(7) == "b/07.jpg" and re.search("b/07.jpg, record 3 of .*00001-of-00003", source.describe(7))
    rows = tfds.builder_from_directory(out).as_data_source("train")
    assert [row["file_name"] for row in rows] == source.listing()
    assert [row["label"] for row in rows] == [0] * 6 + [1] * 6
    np.testing.assert_array_equal(rows[4]["image"], np.asarray(Image.open(files_of(data)[4])))
    assert open_source("images", "train[4:]", data_dir=str(out)).num_examples == 8  # by name, as any set of TFDS


@pytest.mark.parametrize("kind,quality", [("png", 95), ("jpeg", 80)])
def test_larger_images_are_resized_as_pil_does(data, tmp_path, kind, quality):
    said = made(data, tmp_path / "out", stored=dict(shorter=50, format=kind, quality=quality))
    assert said["resized"] == N // 3
    for k, (image, path) in enumerate(zip(stored(tmp_path / "out"), files_of(data))):
        if k % 3:
            assert image == path.read_bytes()
            continue
        small = Image.open(path).resize((60, 50), Image.BICUBIC)
        wanted, stream = io.BytesIO(), io.BytesIO(image)
        small.save(wanted, kind, **({"quality": quality} if kind == "jpeg" else {}))
        np.testing.assert_array_equal(Image.open(stream), Image.open(wanted))


def test_the_note_of_a_camera_stays(tmp_path):
    exif = Image.Exif()
    exif[shard_writer.ORIENTATION] = 6
    write(f"{tmp_path}/data/a.jpg", encode(picture(0, 60, 80), "JPEG", exif=exif))
    made(tmp_path / "data", tmp_path / "out", stored=dict(shorter=30, format="png"))
    image = Image.open(io.BytesIO(stored(tmp_path / "out")[0]))
    assert image.size == (40, 30) and ImageOps.exif_transpose(image).size == (30, 40)


def test_images_in_memory_are_kept_without_loss(tmp_path):
    said = made("", tmp_path / "out", "test", source="sample", shards=2)
    wanted, found = open_source("sample", "test"), open_source("prepared", "test", path=str(tmp_path / "out"), channels=1)
    a, b = (everything(source, size=(32, 32), limit=40) for source in (wanted, found))
    for key in ("image", "label"):
        np.testing.assert_array_equal(a[key], b[key])
    assert said["examples"] == wanted.num_examples and found.class_names == wanted.class_names


def test_a_source_without_random_access(tmp_path):
    Numbered(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
    given = dict(name="numbered", split="train", data_dir=str(tmp_path))
    prepare(Asked(given, str(tmp_path / "out"), shards=2))
    found = open_source("prepared", "train", path=str(tmp_path / "out"))
    assert found.random_access and found.class_names == ("0", "1", "2", "3", "4")
    for key, values in everything(open_source(**given)).items():
        np.testing.assert_array_equal(everything(found)[key], values)


def test_sets_of_labels(tmp_path):
    sets = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    images = np.stack([picture(k) for k in range(3)])
    source = ArraySource(
        "s", "test", 3, ("x", "y", "z"), 3, label_sets=True, images=tf.constant(images), labels=tf.constant(sets, tf.uint8)
    )
    facts = shard_writer.write_shard(
        source, source.file_name, 0, 3, tmp_path / manifest.shard_name("test", 0, 1), shard_writer.Stored(), lambda *_: None
    )
    begun = {"classes": list(source.class_names), "label_sets": True, "missing": ""}
    assert manifest.write_split(tmp_path, "test", begun, [facts])["examples_of_class"] == {"x": 1, "y": 1, "z": 1}
    for name, place in (("prepared", "path"), ("images", "data_dir")):
        found = open_source(name, "test", label_sets=True, **{place: str(tmp_path)})
        assert everything(found)["label"][:3].tolist() == sets
        plain = open_source(name, "test", **{place: str(tmp_path)})
        assert plain.class_names == () and everything(plain)["label"].tolist() == [-1] * 4


def test_several_splits_in_one_folder(data, tmp_path):
    out = tmp_path / "out"
    for split, name in (("train[:50%]", ""), ("train[50%:]", "validation")):
        made(data, out, split, name=name, shards=2)
    there = {split: open_source("prepared", split, path=str(out)).listing() for split in ("train", "validation")}
    names = sorted(name for names in there.values() for name in names)
    assert names == list(open_source("folder", "train", path=str(data)).listing())
    assert set(tfds.builder_from_directory(out).info.splits) == {"train", "validation"}
    write(f"{tmp_path}/flat/0.jpg", encode(picture(0), "JPEG"))
    made(tmp_path / "flat", out, name="test")  # one without labels
    assert open_source("prepared", "test", path=str(out)).missing and len(tfds.builder_from_directory(out).info.splits) == 3
    write(f"{tmp_path}/other/c/0.jpg", encode(picture(0), "JPEG"))
    with pytest.raises(ConfigError, match="different classes, 1 in 'other', 2 in .*choose another --out"):
        made(tmp_path / "other", out, name="other")
    made(data, out, "train[:50%]", shards=2)  # which the refused one does not hinder


# ---- going on


def test_only_what_is_missing_is_made(data, tmp_path):
    out = tmp_path / "out"
    said = made(data, out)
    shards = sorted(out.glob("images-*"))
    before = [path.read_bytes() for path in shards]
    shards[0].unlink()
    shards[1].write_bytes(before[1][:-7])
    (out / f".{shards[0].name}.77").write_bytes(b"left by a process that was killed")
    times = [path.stat().st_mtime_ns for path in shards[1:]]
    assert made(data, out) == said and [path.read_bytes() for path in shards] == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards[1:], times)] == [False, True]
    assert not list(out.glob(".*"))
    (out / "parts-train/begun.json").unlink()  # whose shards are these?
    assert made(data, out, stored=dict(shorter=50))["resized"] == N // 3


def test_another_start_is_refused(data, tmp_path):
    out = tmp_path / "out"
    made(data, out)
    with pytest.raises(ConfigError, match="begun with other settings.*images.shorter: 0 -> 50.*Choose another --out"):
        made(data, out, stored=dict(shorter=50))
    write(f"{data}/b/new.jpg", encode(picture(1), "JPEG"))
    with pytest.raises(ConfigError, match="12 images -> 13; 1 new .b/new.jpg"):
        made(data, out)
    os.rename(data / "b/new.jpg", tmp_path / "new.jpg")
    os.rename(data, tmp_path / "moved")
    assert made(tmp_path / "moved", out)["examples"] == N
    with locked(out_lock := out / "parts-train/host-0-of-1"):
        with pytest.raises(ConfigError, match=f"{out_lock.name}' is being written by process {os.getpid()}.*another --out"):
            made(tmp_path / "moved", out)
    foreign = tmp_path / "foreign"
    write(f"{foreign}/dataset_info.json", b"{}")
    with pytest.raises(ConfigError, match="a data set that mim_jax.prepare did not make"):
        made(tmp_path / "moved", foreign)


def test_hosts_share_the_shards(data, tmp_path):
    said = made(data, tmp_path / "one")
    assert made(data, tmp_path / "two", host=(1, 2)) is None
    assert len(list((tmp_path / "two").glob("images-*"))) == 1
    with pytest.raises(DataError, match="'train' in .*two' is not whole; start the same mim_jax.prepare again"):
        open_source("prepared", "train", path=str(tmp_path / "two"))
    assert made(data, tmp_path / "two", host=(0, 2)) == said


def test_the_command_with_two_processes(data, tmp_path):
    write(f"{data}/b/broken.jpg", b"no image")
    flags = ["--source=folder", f"--path={data}", f"--out={tmp_path}/out", "--shards=3", "--workers=2"]
    command = [sys.executable, "-m", "mim_jax.prepare", *flags]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 images in 3 shards" in done.stdout and re.search("left out, number 1: b/broken.jpg: ", done.stdout)
    said, alone = json.loads((tmp_path / "out/manifest-train.json").read_text()), made(data, tmp_path / "alone")
    assert said == alone and said["skipped"][0]["name"] == "b/broken.jpg"


# ---- what goes wrong


@pytest.mark.parametrize(
    "given,words",
    [
        (["--format=png"], "--format is of images that --shorter resizes"),
        (["--beam=DirectRunner", "--workers=2"], "--workers beside --beam: DirectRunner shares the shards out itself"),
        (["--beam=FlinkRunner", "--host=0/2"], "--host beside --beam: FlinkRunner shares the shards out itself"),
        (["--beam_options=--parallelism=2"], "--beam_options are of a runner that --beam names"),
    ],
)
def test_flags_that_do_not_go_together(data, tmp_path, given, words):
    flags = ["--source=folder", f"--path={data}", f"--out={tmp_path}/out", *given]
    done = subprocess.run([sys.executable, "-m", "mim_jax.prepare", *flags], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_apache_beam(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "mim_jax.data.shard_pipeline", raising=False)
    with pytest.raises(ConfigError, match=r"--beam=DirectRunner needs Apache Beam, .*: pip install -e '.\[beam\]'"):
        made(data, tmp_path / "out", beam=("DirectRunner", ()))
    assert not (tmp_path / "out").exists()


def test_bad_images_are_left_out_by_name_up_to_a_limit(data, tmp_path, capsys):
    whole = files_of(data)[3].read_bytes()
    files_of(data)[3].write_bytes(whole[: len(whole) // 2])
    write(f"{data}/a/empty.jpg", b"")
    said = made(data, tmp_path / "out", bad_limit=0.2)
    assert [row["name"] for row in said["skipped"]] == ["a/03.jpg", "a/empty.jpg"] and said["examples"] == N - 1
    assert (
        said["skipped"][1]["why"] == "it is empty" and "left out, number 2: a/empty.jpg: it is empty" in capsys.readouterr().out
    )
    names = open_source("prepared", "train", path=str(tmp_path / "out")).listing()
    assert len(names) == N - 1 and b"a/03.jpg" not in names
    for _ in range(2):  # a second start knows what the first met
        with pytest.raises(DataError, match=r"(?s)2 of the 13 images .*data.bad_limit=0.1 lets pass|1 of the 13 images"):
            made(data, tmp_path / "strict", bad_limit=0.0)


@pytest.mark.parametrize("call", ["write", "close"])
def test_a_full_disk(data, tmp_path, monkeypatch, call):
    made(data, tmp_path / "out")
    whole = shard_writer.array_record()

    class Full:
        def __init__(self, *given):
            self.writer = whole.ArrayRecordWriter(*given)

        def write(self, record):
            self.fail("write")

        def close(self):
            self.fail("close")

        def fail(self, where):
            if where == call:
                raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(shard_writer, "array_record", lambda: type("", (), {"ArrayRecordWriter": Full}))
    shard = tmp_path / "out" / manifest.shard_name("train", 1, 3)
    shard.unlink()
    with pytest.raises(ConfigError, match="00001-of-00003 cannot be written: .*No space left on device"):
        made(data, tmp_path / "out")
    assert not shard.exists() and not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    assert made(data, tmp_path / "out")["examples"] == N


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(host=(2, 2)), "--host=2/2"),
        (dict(workers=0), "--workers=0"),
        (dict(stored=dict(shorter=-1)), "--shorter=-1"),
        (dict(stored=dict(shorter=9, format="gif")), "--format=gif: choose jpeg or png"),
        (dict(stored=dict(quality=0)), "--quality=0"),
        (dict(name="a b"), "--name=a b"),
        (dict(out="gs://bucket/x"), "--out='gs://bucket/x': shards are written to a folder"),
        (dict(out="/proc/none"), "--out=/proc/none cannot be written"),
    ],
)
def test_options_that_cannot_be(data, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        made(data, **{"out": tmp_path / "out", **options})


# ---- shards that are damaged later


def flipped(file, image):
    """Changes a byte in the middle of an image in a shard."""
    whole = bytearray(file.read_bytes())
    whole[whole.index(image) + len(image) // 2] ^= 255
    file.write_bytes(whole)


@pytest.mark.parametrize("name,place", [("prepared", "path"), ("images", "data_dir")])
def test_a_broken_record_is_replaced_and_named(data, tmp_path, caplog, name, place):
    out = tmp_path / "out"
    made(data, out)
    flipped(out / manifest.shard_name("train", 1, 3), files_of(data)[6].read_bytes())
    options = dict(batch_size=4, size=(16, 16), crop=RandomCrop(), seed=5)
    with caplog.at_level("WARNING", logger="absl"):
        source = open_source(name, "train", **{place: str(out)})
        run = pipeline.TrainBatches(source, **options)
        seen = [run.batch(k) for k in range(3)]
        judged = everything(source)
    assert 6 not in np.concatenate([batch["id"] for batch in seen])
    assert judged["valid"].sum() == N - 1 and not judged["valid"][6]
    assert re.search("record 2 of .*00001-of-00003 cannot be read: .*hash mismatch", caplog.text)
    assert re.search("unreadable, number 1: .*record 2 of .*00001-of-00003: it is empty", caplog.text)
    whole = open_source("folder", "train", path=str(data))
    wanted = pipeline.TrainBatches(whole, **options).batch(0)
    same = seen[0]["id"] == wanted["id"]
    np.testing.assert_array_equal(seen[0]["image"][same], wanted["image"][same])


@pytest.mark.parametrize("name,place", [("prepared", "path"), ("images", "data_dir")])
@pytest.mark.parametrize("damage,words", [("cut", "it is cut off"), ("gone", "No such file"), ("other", "4 records")])
def test_a_shard_that_is_not_whole_is_found_at_opening(data, tmp_path, name, place, damage, words):
    out = tmp_path / "out"
    made(data, out, shards=2)
    shard = out / manifest.shard_name("train", 1, 2)
    whole = shard.read_bytes()
    if damage == "other":
        made(data, tmp_path / "three")
        whole = (tmp_path / "three" / manifest.shard_name("train", 1, 3)).read_bytes()
    shard.unlink() if damage == "gone" else shard.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole)
    with pytest.raises(DataError, match=f"00001-of-00002 is not the whole array_record file it should be: .*({words})"):
        open_source(name, "train", **{place: str(out)})


def test_a_disk_that_is_gone(data, tmp_path):
    made(data, tmp_path / "out")
    source = open_source("prepared", "train", path=str(tmp_path / "out"))

    class Gone:
        def __getitems__(self, ids):
            raise RuntimeError("read() failed: Stale file handle")

        __getitem__ = __getitems__

    source.records._source = Gone()
    with pytest.raises(DataError, match="Reading 'prepared', split 'train', failed: .*Stale file handle"):
        pipeline.TrainBatches(source, batch_size=4, size=(16, 16), crop=RandomCrop(), seed=5).batch(0)


def test_nothing_prepared(tmp_path):
    for path in ("", str(tmp_path / "none")):
        with pytest.raises(DataError, match="needs data.path, the --out of python -m mim_jax.prepare"):
            open_source("prepared", "train", path=path)
    with pytest.raises(DataError, match="is no folder that mim_jax.prepare made"):
        open_source("prepared", "train", path=str(tmp_path))
    write(f"{tmp_path}/manifest-train.json", b"{")
    with pytest.raises(DataError, match="a manifest in .* cannot be read"):
        open_source("prepared", "train", path=str(tmp_path))


def test_names_that_are_cut_off(data, tmp_path):
    made(data, tmp_path / "out")
    names = tmp_path / "out/names-train.gz"
    names.write_bytes(names.read_bytes()[:-20])
    with pytest.raises(DataError, match="the names of 'train' in .* cannot be read .*start the same mim_jax.prepare again"):
        open_source("prepared", "train[:50%]", path=str(tmp_path / "out"))
    made(data, tmp_path / "out")
    assert len(open_source("prepared", "train", path=str(tmp_path / "out")).listing()) == N
