"""Folders of images: what is a split, what is a class, what is an image, and what is left out."""

import io
import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mim_jax.data import augment, layout, listing, name_hashes, pipeline, slices
from mim_jax.data.augment import DataError
from mim_jax.data.image_folder import check_folder
from mim_jax.data.sources import open_source


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)


@pytest.fixture
def make(tmp_path):
    """make({"a": 3, "b/c": (2, "jpg")}) writes so many images into each folder -> the root."""

    def write(counts):
        for k, (folder, n) in enumerate(counts.items()):
            n, ending = n if isinstance(n, tuple) else (n, "png")
            os.makedirs(tmp_path / folder, exist_ok=True)
            for i in range(n):
                Image.fromarray(picture(100 * k + i)).save(tmp_path / folder / f"{i}.{ending}")
        return str(tmp_path)

    return write


def opened(path, split="train", **options):
    return open_source("folder", split, path=path, **options)


def seen(path, split="train", **options):
    """-> how many images, and the names of the classes."""
    source = opened(path, split, **options)
    return source.num_examples, source.class_names


CLASSES = ("cat", "dog")
GOOD = {f"{s}/{c}": n for s, n in (("train", 6), ("val", 4)) for c in CLASSES}

# ---- splits and classes


def test_a_class_that_is_called_like_a_split(make, caplog):
    path = make({name: 3 for name in ("boat", "bus", "car", "train")})
    assert seen(path) == (12, ("boat", "bus", "car", "train"))
    assert "train/ (3 images) is read as a class among 4; data.folders=splits" in caplog.text


@pytest.mark.parametrize("split", [name for names in layout.NAMES.values() for name in names])
@pytest.mark.parametrize("change", [str.lower, str.upper, str.capitalize])
def test_splits_by_their_usual_names(make, split, change):
    path = make({f"{change('train')}/{c}": 1 for c in CLASSES} | {f"{change(split)}/{c}": 2 for c in CLASSES})
    named = layout.SPLIT[split]
    if named == "train" != split:  # train/ and training/
        with pytest.raises(DataError, match="both called like the split 'train'"):
            seen(path)
    else:
        assert seen(path, named) == (4, CLASSES)
        assert seen(path) == (4 if split == "train" else 2, CLASSES)


@pytest.mark.parametrize("beside", ["extra", ""])
def test_images_beside_splits_are_said(make, caplog, beside):
    path = make(GOOD | {beside: 5})
    assert seen(path) == (12, CLASSES) and seen(path, "validation") == (8, CLASSES)
    assert ("5 in extra/" if beside else "5 beside the folders") in caplog.text


@pytest.mark.parametrize(
    "counts,words",
    [
        (
            {"train/cat": 2, "train/dog": 2, "extra": 5},
            r"train in train/ \(4 images\); left out: extra/ \(5\).*Classes: 2 .*9 images",
        ),
        ({"train": 4, "val": 2, "boat": 3}, r"validation in val/ \(2 images\); left out: boat/ \(3\).*Classes: 3 .*9 images"),
        ({"train": 4, "": 2}, "left out: 2 images beside the folders"),
        ({"val": 4, "trainset": 2}, r"left out: trainset/ \(2\)"),
        ({"train2017": 4, "val2017": 2}, "validation trained on.*data.folders=train=train2017,validation=val2017"),
        ({"imagenet_train": 4, "imagenet-val": 2, "TestSet": 1}, "data.folders=test=TestSet,train=imagenet_train,"),
        ({"images/train/cat": 4, "images/val/cat": 2, "labels": 0}, "images/ holds train/, val/.*data.path=.*images"),
        ({"cup/train/good": 4, "cup/test/bad": 2, "pen/train/good": 4}, "cup/ holds test/, train/.*data.folders=classes"),
        (
            {"val": 4, "valid": 2, "train": 1},
            r"val/ \(4 images\) and valid/ \(2 images\).*data.folders=train=train,validation=val",
        ),
        ({"Train/cat": 4, "train/cat": 2}, r"Train/ \(4 images\) and train/ \(2 images\)"),
    ],
)
def test_what_the_rules_do_not_decide_is_refused(make, counts, words):
    path = make(counts)
    with pytest.raises(DataError, match=words):
        seen(path)
    assert seen(path, folders="unlabelled") == (sum(counts.values()), ())


def test_it_can_be_said_outright(make):
    path = make({"train/cat": 2, "train/dog": 2, "extra": 5})
    assert seen(path, folders="splits") == (4, CLASSES)
    assert seen(path, folders="classes") == (9, ("extra", "train"))
    assert seen(path, folders="train=extra,validation=train") == (5, ())
    assert seen(path, "validation", folders="train=extra,validation=train") == (4, CLASSES[:0])
    assert seen(path, "test", folders="train=extra/,test=./train/cat") == (2, ())
    assert seen(path, folders="train=.") == (9, ("extra", "train"))


@pytest.mark.parametrize(
    "said,words",
    [
        ("class", "expected nothing"),
        ("training=train", "expected nothing"),
        ("train=train,train=extra", "expected nothing"),
        ("train=nowhere", "no folder 'nowhere'"),
        ("train=.,validation=val", "'validation' lies in that of 'train'"),
        ("train=val,validation=val", "lies in that of"),
        ("train=../elsewhere", "no folder"),
    ],
)
def test_what_is_said_must_be_there(make, said, words):
    with pytest.raises(DataError, match=words):
        seen(make(GOOD), folders=said)


def test_splits_that_are_not_there(make):
    with pytest.raises(DataError, match="no folder that is called like a split"):
        seen(make({"a": 1, "b": 1}), folders="splits")


def test_a_train_folder_beside_things_that_are_no_images(make, tmp_path):
    path = make({"train/cat": 2, "train/dog": 1, "annotations": 0})
    (tmp_path / "annotations" / "a.xml").write_text("x")
    assert seen(path) == (3, CLASSES)


def test_a_train_folder_without_images(make):
    with pytest.raises(DataError, match="No images in .*train"):
        seen(make({"train": 0, "val/cat": 2}))


def test_without_train_all_splits_number_the_classes(make):
    path = make({"val/cat": 1, "val/dog": 1, "test/dog": 1})
    assert seen(path, "test") == (1, CLASSES) and opened(path, "test").labels.numpy().tolist() == [1]


# ---- images


def save(image, ending):
    stream = io.BytesIO()
    mode = {"pgm": "L", "pbm": "1"}.get(ending, "RGB")
    Image.fromarray(image).convert(mode).save(stream, Image.registered_extensions()[f".{ending}"])
    return stream.getvalue()


@pytest.mark.parametrize("ending", sorted(e.decode()[1:] for e in listing.EXTENSIONS))
def test_what_is_listed_decodes_as_pil_does(tmp_path, ending):
    data = save(picture(1), ending)
    (tmp_path / f"x.{ending.upper()}").write_bytes(data)
    source = opened(str(tmp_path))
    ours = augment.decode(source.load(tf.constant(0, tf.int64))["image"], 3).numpy()
    np.testing.assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_tiff_is_read(make):
    path = make({"a": (3, "jpg"), "b": (9, "tif"), "c": (9, "TIFF"), "d": (1, "jpg")})
    assert seen(path) == (22, ("a", "b", "c", "d"))


def test_what_is_not_read_is_said(make, tmp_path, caplog):
    path = make({"a": 2, "b": 1, "a/@eaDir/0.png": 1, "__MACOSX/a": 2, "a/.thumbnails": 3})
    for name in ("a/x.heic", "a/y.HEIC", "b/notes.txt", "b/README", "b/Thumbs.db", "a/._0.png"):
        (tmp_path / name).write_bytes(b"x")
    os.symlink("nowhere.png", tmp_path / "a" / "gone.png")
    os.symlink("self.png", tmp_path / "a" / "self.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # reading it would wait for ever
    assert seen(path) == (3, ("a", "b"))
    for words in ("2 .heic", "1 .txt", "1 without an ending", "2 broken links", "1 that are no files"):
        assert words in caplog.text
    for words in ("1 x @eaDir", "1 x __MACOSX", "2 x a hidden name", "1 x Thumbs.db"):
        assert words in caplog.text


@pytest.mark.parametrize("holds", [[], ["1.heic", "2.heic"]])
def test_a_class_without_images_is_refused(make, tmp_path, holds):
    path = make({"a": 1, "b": 0, "c": 1})
    for name in holds:
        (tmp_path / "b" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"b/ \(2 .heic\)" if holds else r"b/ \(nothing\)"):
        seen(path)
    assert seen(path, folders="unlabelled") == (2, ())


def test_a_folder_that_cannot_be_read_is_named(make, tmp_path, monkeypatch):
    path, scandir = make({"a": 1, "b": 1}), os.scandir

    def refuse(place):
        if os.fsencode(place).endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="b' cannot be read: Permission denied"):
        seen(path)


# ---- links


def test_a_link_upwards_is_not_followed(make, tmp_path, caplog):
    path = make({"a": 3, "b": 3})
    os.symlink("..", tmp_path / "b" / "up")
    os.symlink(tmp_path.parent, tmp_path / "a" / "above")
    os.symlink("/", tmp_path / "a" / "everything")
    assert seen(path) == (6, ("a", "b"))
    assert "b/up is the folder itself" in caplog.text and "a/above is" in caplog.text


def test_links_to_each_other(make, tmp_path):
    path = make({"a": 3, "b": 3})
    os.symlink("../a", tmp_path / "b" / "a")
    os.symlink("../b", tmp_path / "a" / "b")
    source = opened(path)
    assert source.num_examples == 6 and source.labels.numpy().tolist() == [0] * 3 + [1] * 3


def test_links_elsewhere_are_followed(make, tmp_path, caplog):
    make({"store/cats": 2, "store/dogs": 3, "set/train": 0, "set/val": 0})
    for split, kind in (("train", "cats"), ("train", "dogs"), ("val", "dogs")):  # val/dogs are those of train/dogs
        os.symlink(tmp_path / "store" / kind, tmp_path / "set" / split / kind)
    os.symlink("../../store/cats/0.png", tmp_path / "set" / "val" / "cat.png")
    path = str(tmp_path / "set")
    assert seen(path) == (5, ("cats", "dogs"))
    assert "val/dogs/ is train/dogs/: its images are in the splits train and validation" in caplog.text
    source = opened(path, "validation")
    assert [source.file_name(i) for i in range(4)] == ["val/cat.png", "val/dogs/0.png", "val/dogs/1.png", "val/dogs/2.png"]
    assert source.labels.numpy().tolist() == [-1, 1, 1, 1]


def test_a_split_that_is_a_link_to_another(make, tmp_path):
    path = make({"train/cat": 2, "train/dog": 1})
    os.symlink("train", tmp_path / "val")
    assert seen(path) == seen(path, "validation") == (3, CLASSES)


# ---- names


def test_names_that_are_not_utf8(make, tmp_path):
    path = make({"a": 1, "b": 0})
    (tmp_path / "a" / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/b/stra\xdfe.png"))
    make({"a": 1})
    os.rename(os.fsencode(path) + b"/b", os.fsencode(path) + b"/\xe9t\xe9")
    source = opened(path)
    assert source.class_names == ("a", r"\xe9t\xe9")
    assert source.file_name(1) == r"\xe9t\xe9/stra\xdfe.png" and source.describe(1) == rf"{path}/\xe9t\xe9/stra\xdfe.png"
    batches = pipeline.eval_batches(source, batch_size=2, size=(16, 16), resize_ratio=1.0)
    assert next(batches)["label"].tolist() == [0, 1]
    with open(os.fsencode(path) + b"/\xe9t\xe9/stra\xdfe.png", "wb") as f:
        f.write(b"broken")
    assert check_folder(path) == [rf"{path}/\xe9t\xe9/stra\xdfe.png"]


def test_order_is_by_the_parts_of_a_path(make):
    path = make({"a": 1, "a b": 1, "a-b": 1, "a/b": 1})
    source = opened(path)
    assert [source.file_name(i) for i in range(4)] == ["a/0.png", "a/b/0.png", "a b/0.png", "a-b/0.png"]


# ---- labels where they are used


def test_a_flat_validation_folder(make):
    path = make({"train/cat": 6, "train/dog": 6, "val": 6})
    source = opened(path, "validation")
    assert (source.num_examples, source.class_names) == (6, ())
    with pytest.raises(DataError, match="knn needs labels.*val lie in no class folders"):
        source.require_labels("knn")


def test_images_beside_classes(make, caplog):
    path = make({"cat": 2, "dog": 2, "": 1})
    assert seen(path) == (5, ()) and "1 images of" in caplog.text and "data.folders=classes" in caplog.text
    with pytest.raises(DataError, match="beside 2 class folders"):
        opened(path).require_labels("finetune")
    assert seen(path, folders="classes") == (4, CLASSES)


def test_labels_are_counted_by_other_names(make):
    source = opened(make({"cat": 1, "dog": 2}))
    found = source.counted_by(("ant", "bee", "cat", "cow", "dog"))
    batches = pipeline.eval_batches(found, batch_size=3, size=(16, 16), resize_ratio=1.0)
    assert next(batches)["label"].tolist() == [2, 4, 4] and found.num_classes == 5
    assert found.describe(0) == source.describe(0) and found.listing() == source.listing()
    with pytest.raises(DataError, match="1 other classes .dog"):
        source.counted_by(("ant", "cat"))


# ---- slices


def names_of(path, split, **options):
    return set(opened(path, split, **options).listing())


def test_slices_of_a_folder(make):
    path = make({"a": 60, "b": 60})
    whole, first, rest = (names_of(path, split) for split in ("train", "train[:75%]", "train[75%:]"))
    assert first | rest == whole and not first & rest and 70 < len(first) < 110
    assert names_of(path, "train[-25%:]") == rest == names_of(path, "train[75%:90%]+train[90%:]")
    assert names_of(path, "train[:50%]") < first
    assert len(names_of(path, "train[:7]")) == 7 and names_of(path, "train[:7]") < names_of(path, "train[:8]")
    assert names_of(path, "train[:-7]") | names_of(path, "train[-7:]") == whole
    assert opened(path, "train[:3]").class_names == ("a", "b")
    assert first == {name for name in whole if slices.share(name) < 0.75}


def test_a_slice_keeps_its_images_when_others_come_and_go(make, tmp_path):
    path = make({"a": 30, "b": 30})
    before = names_of(path, "train[:50%]")
    make({"c": 30})
    (tmp_path / "a" / "0.png").unlink()
    assert names_of(path, "train[:50%]") - {b"a/0.png"} >= before - {b"a/0.png"}
    assert {name for name in names_of(path, "train[:50%]") if not name.startswith(b"c/")} == before - {b"a/0.png"}


def test_a_share_is_what_it_is_said_to_be():
    said = subprocess.run(["b2sum", "-l", "64"], input=b"a/0.png", capture_output=True, check=True).stdout.split()[0]
    assert slices.share(b"a/0.png") == int(said, 16) / 2**64


def test_shares_of_many_names_at_once():
    rng = np.random.default_rng(0)
    lengths = [0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 400, *rng.integers(1, 90, 300)]  # blocks are of 128 bytes
    names = [rng.integers(1, 256, n, np.uint8).tobytes() for n in lengths]
    found = name_hashes.hashes((b"".join(name + b"\0" for name in part) for part in (names[:5], names[5:])), len(names))
    assert (found.astype(np.float64) / 2**64).tolist() == [slices.share(name) for name in names]


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[5]", "", "train[:1.5%]"])
def test_what_is_no_slice(make, split):
    with pytest.raises(DataError, match="train.:90%"):
        opened(make({"a": 1, "b": 1}), split)


def test_a_slice_without_images(make):
    with pytest.raises(DataError, match="'train.2:.' of .* holds none"):
        opened(make({"a": 1, "b": 1}), "train[2:]")


def test_a_validation_split_out_of_the_training_images(make):
    path = make({"a": 60, "b": 60})
    train, validation = (names_of(path, split, holdout=20) for split in ("train", "validation"))
    assert train | validation == names_of(path, "train") and not train & validation
    assert validation == names_of(path, "train[80%:]")
    assert names_of(path, "train[:10%]", holdout=20) == names_of(path, "train[:10%]")
    assert names_of(path, "train[50%:]", holdout=20) == names_of(path, "train[50%:80%]")


def test_a_holdout_beside_a_validation_split(make):
    with pytest.raises(DataError, match="data.holdout=20 .* has one in val/"):
        opened(make(GOOD), "train", holdout=20)


# ---- one listing


def test_a_folder_is_walked_once(make, monkeypatch):
    path, walked = make(GOOD), []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: (walked.append(place), scandir(place))[1])
    for split in ("train", "validation", "train[:50%]", "train"):
        opened(path, split)
    assert len(walked) == 7  # the root, 2 splits, 4 classes
    make({"train/cat": 9})
    assert seen(path) == (15, CLASSES)


@pytest.mark.parametrize("name, form", [("train-0.parquet", "parquet"), ("0.tar", "webdataset"), ("train.csv", "list")])
def test_a_folder_of_another_form_names_its_source(name, form, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"No images in .*Is it data.source={form}"):
        open_source("folder", "train", path=str(tmp_path))
