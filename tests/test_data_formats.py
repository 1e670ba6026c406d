"""Parquet, tar shards, lists and array_record: the same images give the same batches, and what is wrong with them is named."""

import csv
import io
import json
import os
import pathlib
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from test_data_sources import encode, everything, picture, write

from mim_jax.data import augment, kept, parquet_source, pipeline, shards, tar_index
from mim_jax.data.augment import DataError
from mim_jax.data.sources import open_source
from mim_jax.jobs.preparation import Asked, prepare

CLASSES = ("cat", "dog", "fish")
TRAIN, VALIDATION = 14, 5
ENCODED = {
    "train": [(encode(picture(k), ("JPEG", "PNG", "WEBP")[k % 3]), (".jpg", ".png", ".webp")[k % 3]) for k in range(TRAIN)],
    "val": [(encode(picture(90 + k), "JPEG"), ".jpeg") for k in range(VALIDATION)],
}
LABELS = {"train": [k * 3 // TRAIN for k in range(TRAIN)], "val": [0, 1, 1, 2, 2]}


def hugging_face(labels=CLASSES):
    """Metadata of a schema as the hub writes it."""
    label = {"names": list(labels), "_type": "ClassLabel"}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()}


def table(images, labels, metadata=None, image="image", label="label"):
    """`images` as structs, or as they are where they are bytes; labels None: no such column."""
    structs = [{"bytes": data, "path": f"{k}.jpg"} if isinstance(data, bytes) else data for k, data in enumerate(images)]
    columns = {image: structs} if labels is None else {image: structs, label: labels}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_parquet(path, rows, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(rows, path, **options)


def write_tar(path, members, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)


def sample_of(k, data, ending, label):
    return [(f"{k:04d}{ending}", data), (f"{k:04d}.cls", str(label).encode())]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{source: data.path} of the same images and labels in every form, in several files, row groups and shards."""
    root = tmp_path_factory.mktemp("forms")
    for split, images in ENCODED.items():
        names = [f"{split}/{CLASSES[c]}/{k:04d}{e}" for k, ((_, e), c) in enumerate(zip(images, LABELS[split]))]
        for name, (data, _) in zip(names, images):
            write(str(root / "folder" / name), data)
        word = {"val": "validation"}.get(split, split)
        half = len(images) // 2
        for part, piece in enumerate((slice(0, half), slice(half, None))):
            rows = table([data for data, _ in images[piece]], LABELS[split][piece], hugging_face())
            write_parquet(f"{root}/parquet/data/{word}-{part:05d}-of-00002.parquet", rows, row_group_size=3)
            numbered = list(zip(range(len(images)), images, LABELS[split]))[piece]
            members = [m for k, (data, ending), c in numbered for m in sample_of(k, data, ending, c)]
            write_tar(f"{root}/webdataset/set-{split}-{part:04d}.tar", members)
        listed = [(f"../folder/{name}", CLASSES[c]) for name, c in zip(names, LABELS[split])]
        os.makedirs(root / "list", exist_ok=True)
        write_csv(root / "list" / f"{split}.csv", [("path", "label"), *listed])
    (root / "webdataset/classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "validation"):
        opening = dict(name="folder", split=split, path=str(root / "folder"))
        prepare(Asked(opening, str(root / "prepared"), shards=3))
    return {name: str(root / name) for name in ("folder", *FORMS)}


FILES = ("parquet", "webdataset", "list")
FORMS = (*FILES, "prepared")


def batches(source, **options):
    options = {"batch_size": 4, "size": (16, 24), "crop": augment.RandomCrop(), "seed": 5, **options}
    return pipeline.TrainBatches(source, **options)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_give_the_same_batches(forms, form):
    folder, other = (open_source(name, "train", path=forms[name]) for name in ("folder", form))
    assert other.class_names == folder.class_names == CLASSES
    assert other.num_examples == TRAIN and other.random_access
    expected, run = batches(folder), batches(other)
    wanted = [expected.batch(k) for k in range(8)]  # into the third epoch
    for step in range(8):
        assert_same(run.batch(step), wanted[step])
    assert_same(batches(other).batch(5), wanted[5])  # a restart
    shares = [batches(other, process=(p, 2)).batch(3) for p in range(2)]
    assert_same({key: np.concatenate([share[key] for share in shares]) for key in shares[0]}, wanted[3])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_judged_alike(forms, form):
    folder, other = (open_source(name, "validation", path=forms[name]) for name in ("folder", form))
    assert_same(everything(other), everything(folder))
    assert everything(other)["label"][:VALIDATION].tolist() == LABELS["val"]
    assert_same(everything(other, limit=3, process=(1, 2)), everything(folder, limit=3, process=(1, 2)))


@pytest.mark.parametrize("form", FORMS)
def test_another_split_names_those_that_are_there(forms, form):
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        open_source(form, "test", path=forms[form])


def test_examples_are_named(forms):
    named = {form: open_source(form, "train", path=forms[form]) for form in FILES}
    assert named["parquet"].describe(8).endswith("row 1 of " + forms["parquet"] + "/data/train-00001-of-00002.parquet")
    assert named["parquet"].file_name(8) == "data/train-00001-of-00002.parquet/1"
    assert named["webdataset"].describe(8) == f"0008.webp in {forms['webdataset']}/set-train-0001.tar"
    assert named["webdataset"].file_name(0) == "set-train-0000.tar/0000.jpg"
    assert named["list"].file_name(0) == "../folder/train/cat/0000.jpg"
    assert named["webdataset"].sizes(100) == named["list"].sizes(100) == [len(data) for data, _ in ENCODED["train"]]
    assert len({source.file_name(k) for source in named.values() for k in range(TRAIN)}) == 3 * TRAIN
    folder, prepared = (open_source(form, "train[20%:]", path=forms[form]) for form in ("folder", "prepared"))
    assert folder.listing() == prepared.listing()  # the same images in every slice


@pytest.mark.parametrize("form", FORMS)
def test_slices_and_held_out_examples(forms, form, tmp_path):
    whole = open_source(form, "train", path=forms[form])
    first, rest = (open_source(form, split, path=forms[form]) for split in ("train[:60%]", "train[60%:]"))
    assert first.num_examples and rest.num_examples and first.class_names == whole.class_names
    assert sorted([*first.listing(), *rest.listing()]) == sorted(whole.listing())
    place = whole.file_name(int(first.ids[-1]))
    assert first.file_name(first.num_examples - 1) == place and first.describe(0) == whole.describe(int(first.ids[0]))
    own, all_of_it = everything(first), everything(whole)
    n = first.num_examples
    np.testing.assert_array_equal(own["image"][:n], all_of_it["image"][first.ids])
    np.testing.assert_array_equal(own["label"][:n], all_of_it["label"][first.ids])
    assert open_source(form, "train[:60%]+train[60%:]", path=forms[form]).listing() == whole.listing()
    assert open_source(form, "train[:3]", path=forms[form]).num_examples == 3
    with pytest.raises(DataError, match="data.holdout=40 makes a validation split, and this data has one"):
        open_source(form, "train", path=forms[form], holdout=40)


def test_a_part_is_held_out_where_there_is_no_validation_split(tmp_path):
    rows = table([encode(picture(k), "PNG") for k in range(20)], list(range(20)))
    write_parquet(f"{tmp_path}/all.parquet", rows, row_group_size=7)
    kept, held = (open_source("parquet", split, path=str(tmp_path), holdout=30) for split in ("train", "validation"))
    labels = [set(everything(source)["label"].tolist()) - {-1} for source in (kept, held)]
    assert all(labels) and labels[0] | labels[1] == set(range(20)) and not labels[0] & labels[1]
    assert kept.class_names == held.class_names == tuple(map(str, range(20)))


# ---- which files are of which split


@pytest.mark.parametrize(
    "path,split,folder",
    [
        ("data/train-00000-of-00002.parquet", "train", "data"),
        ("validation-00000-of-00001-0a1b.parquet", "validation", ""),
        ("train_extra-00000-of-00001.parquet", "train_extra", ""),
        ("imagenet1k-VAL-0001.tar", "validation", ""),
        ("default/test/0000.parquet", "test", "default"),
        ("train2017/00/0000.tar", "train", ""),
        ("shard-0000.tar", "", ""),
    ],
)
def test_a_path_says_its_split(path, split, folder):
    assert shards.split_of(path) == (split, folder)


def test_a_path_of_two_splits_is_refused():
    with pytest.raises(DataError, match="may be of 'test' or 'train'.*pattern"):
        shards.split_of("train/test-0000.tar")


def test_subsets_beside_each_other_are_refused_and_a_pattern_takes_them(tmp_path):
    for k, subset in enumerate(("large", "small")):
        write_parquet(f"{tmp_path}/{subset}/train-00000-of-00001.parquet", table([encode(picture(k), "PNG")], [0]))
    with pytest.raises(DataError, match="1 in 'large', 1 in 'small'"):
        open_source("parquet", "train", path=str(tmp_path))
    assert open_source("parquet", "train", path=f"{tmp_path}/large").num_examples == 1
    assert open_source("parquet", "train", path=f"{tmp_path}/*/train-*.parquet").num_examples == 2


def test_unnamed_files_beside_named_ones_are_said(tmp_path, caplog):
    for name in ("train-0.tar", "more-0.tar"):
        write_tar(f"{tmp_path}/{name}", sample_of(0, encode(picture(0), "PNG"), ".png", 0))
    assert open_source("webdataset", "train", path=str(tmp_path)).num_examples == 1
    assert "1 files that name no split are not read" in caplog.text and "more-0.tar" in caplog.text


def test_patterns(forms, tmp_path):
    root = forms["webdataset"]
    assert open_source("webdataset", "train", path=root + "/set-train-{0000..0001}.tar").num_examples == TRAIN
    assert open_source("webdataset", "train", path=root + "/set-train-*1.tar").num_examples == TRAIN - TRAIN // 2
    assert open_source("webdataset", "validation", path=root + "/set-{train,val}-0000.tar").num_examples == VALIDATION // 2
    with pytest.raises(DataError, match=r"no '.*set-train-0002.tar' \(2 such\)"):
        open_source("webdataset", "train", path=root + "/set-train-{0000..0003}.tar")


@pytest.mark.parametrize("form", FILES)
def test_nothing_there(form, tmp_path):
    with pytest.raises(DataError, match=f"data.source={form} needs data.path"):
        open_source(form, "train")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_source(form, "train", path=f"{tmp_path}/none")
    with pytest.raises(DataError, match="holds no .*file, but nothing"):
        open_source(form, "train", path=str(tmp_path))


def test_a_folder_linked_into_itself_is_read_once(tmp_path):
    write_tar(f"{tmp_path}/a/train-0.tar", sample_of(0, encode(picture(0), "PNG"), ".png", 0))
    os.symlink("..", tmp_path / "a/up")
    assert shards.listed(str(tmp_path), (".tar",)) == ["a/train-0.tar"]


# ---- columns and labels


@pytest.mark.parametrize("images", ["struct", "bytes"])
@pytest.mark.parametrize("labels", [None, [0, 2], ["zebra", "ant"], [-1, -1], [True, False], [1.0, 0.0]])
def test_columns_of_parquet(tmp_path, images, labels):
    pictures = [encode(picture(k), "PNG") for k in range(2)]
    rows = table(pictures, labels)
    if images == "bytes":
        rows = rows.set_column(0, "image", pa.array(pictures))
    write_parquet(f"{tmp_path}/x/one.parquet", rows)
    source = open_source("parquet", "train", path=f"{tmp_path}/x/one.parquet")
    found = everything(source)
    names, numbers = {
        "None": ((), [-1, -1]),
        "[0, 2]": (("0", "1", "2"), [0, 2]),
        "['zebra', 'ant']": (("ant", "zebra"), [1, 0]),
        "[-1, -1]": ((), [-1, -1]),
        "[True, False]": (("0", "1"), [1, 0]),
        "[1.0, 0.0]": (("0", "1"), [1, 0]),
    }[str(labels)]
    assert (source.class_names, found["label"][:2].tolist()) == (names, numbers)
    whole = everything(source, size=(40, 48))["image"]
    np.testing.assert_array_equal(whole[1], picture(1))


def test_other_columns_are_found_or_named(tmp_path):
    data = encode(picture(0), "PNG")
    write_parquet(f"{tmp_path}/a.parquet", table([data], [3], image="img", label="fine"))
    assert open_source("parquet", "train", path=f"{tmp_path}/a.parquet").num_classes == 0
    assert open_source("parquet", "train", path=f"{tmp_path}/a.parquet", columns="label=fine").num_classes == 4
    write_parquet(
        f"{tmp_path}/b.parquet", table([data], [3]).append_column("thumb", pa.array([b"x"])).rename_columns(["l", "n", "r"])
    )
    with pytest.raises(DataError, match="l and r may be the image; name the column with data.columns=image=NAME"):
        open_source("parquet", "train", path=f"{tmp_path}/b.parquet")
    assert everything(open_source("parquet", "train", path=f"{tmp_path}/b.parquet", columns="image=l"))["image"].any()
    write_parquet(f"{tmp_path}/c.parquet", pa.table({"text": ["a"], "label": [0]}))
    with pytest.raises(DataError, match=r"the columns text \(string\), label \(int64\): none of encoded images"):
        open_source("parquet", "train", path=f"{tmp_path}/c.parquet")
    with pytest.raises(DataError, match="no column 'nope'"):
        open_source("parquet", "train", path=f"{tmp_path}/a.parquet", columns="image=nope")


def test_labels_that_are_no_classes_can_be_left(tmp_path):
    write_parquet(f"{tmp_path}/a.parquet", table([encode(picture(0), "PNG")], [[1, 2]]))
    with pytest.raises(DataError, match="neither a whole number nor a text; data.columns=label= reads without"):
        open_source("parquet", "train", path=f"{tmp_path}/a.parquet")
    assert open_source("parquet", "train", path=f"{tmp_path}/a.parquet", columns="label=").num_classes == 0


def test_classes_are_those_of_train(tmp_path, caplog):
    for split, labels in (("train", ["b", "d"]), ("validation", ["d", "c"])):
        pictures = [encode(picture(k), "PNG") for k in range(2)]
        write_parquet(f"{tmp_path}/{split}-00000-of-00001.parquet", table(pictures, labels))
    source = open_source("parquet", "validation", path=str(tmp_path))
    assert source.class_names == ("b", "d") and source.labels.numpy().tolist() == [1, -1]
    with pytest.raises(DataError, match="knn needs labels, which parquet 'validation' has not .*: c"):
        source.require_labels("knn")
    assert "1 of 2 examples have labels that the training split has not: c" in caplog.text


def test_classes_named_otherwise_in_train_are_refused(tmp_path):
    for split, names in (("train", CLASSES), ("test", CLASSES[::-1])):
        write_parquet(f"{tmp_path}/{split}.parquet", table([encode(picture(0), "PNG")], [0], hugging_face(names)))
    with pytest.raises(DataError, match="'cat', 'fish'"):
        open_source("parquet", "test", path=str(tmp_path))


def test_more_labels_than_names(tmp_path):
    write_parquet(f"{tmp_path}/a.parquet", table([encode(picture(0), "PNG")], [3], hugging_face()))
    with pytest.raises(DataError, match="not among the 3 class names: 3"):
        open_source("parquet", "train", path=f"{tmp_path}/a.parquet")
    write_parquet(f"{tmp_path}/b.parquet", table([encode(picture(0), "PNG")], [2**40]))
    with pytest.raises(DataError, match="labels go from"):
        open_source("parquet", "train", path=f"{tmp_path}/b.parquet")


@pytest.mark.parametrize("columns", ["image", "image=", "picture=x", "image=a;label=b,"])
def test_columns_spelt_wrong(forms, columns):
    with pytest.raises(DataError, match="write image=NAME,label=NAME"):
        open_source("parquet", "train", path=forms["parquet"], columns=columns)
    with pytest.raises(DataError, match="not for 'folder'"):
        open_source("folder", "train", path=forms["folder"], columns=columns)


# ---- parquet files


def test_a_cut_parquet_file_is_named(forms, tmp_path):
    whole = pathlib.Path(forms["parquet"], "data/train-00000-of-00002.parquet").read_bytes()
    (tmp_path / "train-0.parquet").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="train-0.parquet is no whole Parquet file"):
        open_source("parquet", "train", path=str(tmp_path))


def test_a_missing_image_is_named(tmp_path, caplog):
    pictures = [encode(picture(0), "PNG"), {"bytes": None, "path": "elsewhere.png"}]
    write_parquet(f"{tmp_path}/a.parquet", table(pictures, [0, 1]))
    with caplog.at_level("WARNING", logger="absl"):
        everything(open_source("parquet", "train", path=f"{tmp_path}/a.parquet"))
    assert re.search("row 1 of .*a.parquet: it is empty", caplog.text) and "1 images could not be read" in caplog.text


def test_row_groups_are_kept_up_to_a_limit():
    read, held = [], lambda key: read.append(key) or np.zeros(100, np.uint8)
    recent = parquet_source.Recent(held, limit=250)
    for key in (0, 1, 0, 2, 0, 1):  # 1 is the oldest when 2 comes
        recent(key)
    assert read == [0, 1, 2, 1]
    alone = parquet_source.Recent(held, limit=10)
    assert alone(7) is alone(7)


def test_a_row_group_that_cannot_be_read_is_tried_again():
    tries = []

    def read(key):
        tries.append(key)
        raise OSError("gone")

    recent = parquet_source.Recent(read)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            recent(3)
    assert tries == [3, 3]


# ---- tar shards


def shard(tmp_path, members, name="train-0.tar", **options):
    write_tar(f"{tmp_path}/{name}", members, **options)
    return str(tmp_path)


def test_labels_of_tar_shards(tmp_path):
    data = encode(picture(0), "PNG")
    path = shard(
        tmp_path, [("a.json", b'{"label": "wolf"}'), ("a.png", data), ("b.PNG", data), ("b.json", b'{"label": "elk"}')]
    )
    source = open_source("webdataset", "train", path=path)
    assert (source.class_names, source.labels.numpy().tolist()) == (("elk", "wolf"), [1, 0])
    with pytest.raises(DataError, match="train-0.tar cannot be read .*json without a field 'kind'"):
        open_source("webdataset", "train", path=path, columns="label=kind")
    assert open_source("webdataset", "train", path=path, columns="label=").num_classes == 0


def test_tar_without_labels_and_with_other_members(tmp_path, caplog):
    data = encode(picture(0), "PNG")
    members = [("./d/a.png", data), ("./d/a.txt", b"a caption"), ("._a.png", b"x"), ("e/a.png", data), ("e/b.seg.png", data)]
    source = open_source("webdataset", "train", path=shard(tmp_path, members))
    assert source.num_examples == 2 and everything(source)["label"].tolist() == [-1] * 4
    for words in ("1 .txt", "1 hidden", "1 .seg.png", "1 samples without image"):
        assert words in caplog.text
    open_source("webdataset", "train", path=str(tmp_path))
    assert caplog.text.count("1 .seg.png") == 2  # said again where the index is there already


def test_no_image_in_a_tar(tmp_path):
    with pytest.raises(DataError, match="No images in the 1 tar shards.*1 .txt"):
        open_source("webdataset", "train", path=shard(tmp_path, [("a.txt", b"x")]))


def test_two_images_of_a_sample(tmp_path):
    data = encode(picture(0), "PNG")
    path = shard(tmp_path, [("a.png", data), ("a.jpg", encode(picture(1), "JPEG"))])
    with pytest.raises(DataError, match="two images of one sample, the second is 'a.jpg'"):
        open_source("webdataset", "train", path=path)
    image = everything(open_source("webdataset", "train", path=path, columns="image=png"), size=(40, 48))["image"][0]
    np.testing.assert_array_equal(image, picture(0))


@pytest.mark.parametrize("damage", ["cut in an image", "cut in a header", "header", "another tar behind"])
def test_broken_tars_are_named(tmp_path, damage):
    members = [m for k in range(3) for m in sample_of(k, encode(picture(k), "PNG"), ".png", k)]
    file = pathlib.Path(shard(tmp_path, members), "train-0.tar")
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[4]
    broken = {
        "cut in an image": whole[: last.offset_data + 50],
        "cut in a header": whole[: last.offset + 100],
        "header": whole[: last.offset] + b"\x07" * 512 + whole[last.offset + 512 :],
        "another tar behind": whole + whole,
    }
    file.write_bytes(broken[damage])
    with pytest.raises(DataError, match="train-0.tar cannot be read as a tar shard"):
        open_source("webdataset", "train", path=str(tmp_path))


def test_long_names_in_tars(tmp_path):
    for k, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        shard(tmp_path, [(f"{'d' * 90}/{'n' * 90}ü.png", encode(picture(k), "PNG"))], f"train-{k}.tar", format=kind)
    source = open_source("webdataset", "train", path=str(tmp_path))
    np.testing.assert_array_equal(everything(source, size=(40, 48))["image"][1], picture(1))
    assert source.describe(1).startswith("d" * 90 + "/" + "n" * 90 + "ü.png in ")


def test_the_index_is_made_once_and_anew_for_other_shards(tmp_path, monkeypatch):
    made = []
    make = tar_index._make
    monkeypatch.setattr(tar_index, "_make", lambda *given: made.append(given) or make(*given))
    path = shard(tmp_path, sample_of(0, encode(picture(0), "PNG"), ".png", 0))
    for _ in range(2):
        assert open_source("webdataset", "train", path=path).num_examples == 1
    (index,) = tmp_path.glob("mim_jax_index_*.npz")
    assert len(made) == 1
    index.write_bytes(index.read_bytes()[:-50])  # a broken one
    open_source("webdataset", "train", path=path)
    assert len(made) == 2
    shard(tmp_path, [m for k in range(2) for m in sample_of(k, encode(picture(k), "PNG"), ".png", k)])
    assert open_source("webdataset", "train", path=path).num_examples == 2
    assert len(made) == 3 and len(list(tmp_path.iterdir())) == 2  # no part of a file is left


def test_an_index_that_cannot_lie_beside_its_shards(tmp_path, monkeypatch, caplog):
    path = shard(tmp_path / "set", sample_of(0, encode(picture(0), "PNG"), ".png", 0))
    save = kept._write

    def read_only(file, *given):
        if str(file).startswith(path):
            raise PermissionError("read-only")
        save(file, *given)

    monkeypatch.setattr(kept, "_write", read_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        open_source("webdataset", "train", path=path)
    assert len(list((tmp_path / "cache/mim_jax").glob("*.npz"))) == 1
    assert caplog.text.count("cannot be kept") == 1


def test_a_shard_that_vanishes_is_named(tmp_path, caplog):
    source = open_source("webdataset", "train", path=shard(tmp_path, sample_of(0, encode(picture(0), "PNG"), ".png", 0)))
    os.remove(tmp_path / "train-0.tar")
    with caplog.at_level("WARNING", logger="absl"):
        everything(source)
    assert re.search("number 1: .*train-0.tar", caplog.text)


# ---- lists


@pytest.fixture
def images(tmp_path):
    for k in range(4):
        write(str(tmp_path / f"images/{k} ü.png"), encode(picture(k), "PNG"))
    return [f"images/{k} ü.png" for k in range(4)]


LISTS = {
    "a.csv": lambda p: "path,label\n" + "".join(f'"{x}",{k}\n' for k, x in enumerate(p)),
    "bare.csv": lambda p: "".join(f"{x},{k}\n" for k, x in enumerate(p)),
    "bom.csv": lambda p: "\ufefflabel,path\r\n" + "".join(f"{k},{x}\r\n\r\n" for k, x in enumerate(p)),
    "a.tsv": lambda p: "file_name\tclass\n" + "".join(f"{x}\t{k}\n" for k, x in enumerate(p)),
    "a.jsonl": lambda p: "".join(json.dumps({"image": x, "label": k}) + "\n" for k, x in enumerate(p)),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path, images, name):
    (tmp_path / name).write_text(LISTS[name](images), newline="")
    source = open_source("list", "train", path=str(tmp_path / name))
    assert source.class_names == ("0", "1", "2", "3") and source.labels.numpy().tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(everything(source, size=(40, 48))["image"][2], picture(2))


def test_a_list_without_labels(tmp_path, images):
    (tmp_path / "a.csv").write_text("\n".join(images))
    assert open_source("list", "train", path=str(tmp_path / "a.csv")).num_classes == 0
    (tmp_path / "b.csv").write_text("path,label\n" + "\n".join(f"{x},a" for x in images))
    assert open_source("list", "train", path=str(tmp_path / "b.csv")).class_names == ("a",)  # one class is one
    assert open_source("list", "train", path=str(tmp_path / "b.csv"), columns="label=").num_classes == 0


def test_a_column_says_the_split(tmp_path, images):
    rows = [("path", "label", "split"), *((x, "ba"[k % 2], ("Train", "train", "dev", "odd")[k]) for k, x in enumerate(images))]
    write_csv(tmp_path / "all.csv", rows)
    opened = {split: open_source("list", split, path=str(tmp_path / "all.csv")) for split in ("train", "validation", "odd")}
    assert [source.num_examples for source in opened.values()] == [2, 1, 1]
    assert all(source.class_names == ("a", "b") for source in opened.values())
    with pytest.raises(DataError, match="it has train, validation, odd"):
        open_source("list", "test", path=str(tmp_path / "all.csv"))


def test_missing_files_are_counted(tmp_path, images):
    (tmp_path / "a.csv").write_text("path\n" + "\n".join([*images, "images/x.png", "other/y.png"]))
    with pytest.raises(DataError, match="2 of 6 files are not there: .*images/x.png, .*other/y.png"):
        open_source("list", "train", path=str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("a.csv", "path,label\na.png,1,2\n", "line 2, has 3 columns instead of 2"),
        ("a.csv", "x,y,z\n1,2,3\n", "names no image: it has x, y, z"),
        ("a.csv", "image,file\na,b\n", "image and file may be the image"),
        ("a.csv", "", "lists no image"),
        ("a.jsonl", '{"path": "a.png"}\n{"path"\n', "line 2 is no JSON"),
        ("a.jsonl", '["a.png"]\n', "line 1 is no JSON object"),
        ("a.jsonl", '{"path": "a.png", "label": [1]}\n', "not there"),
        ("a.csv", "filename,file\na,b\n", "filename and file may be the image"),
    ],
)
def test_lists_that_are_none(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        open_source("list", "train", path=str(tmp_path / name))


def test_names_that_are_not_utf8(tmp_path):
    write(os.fsencode(tmp_path) + b"/\xe9.png", encode(picture(3), "PNG"))
    (tmp_path / "a.csv").write_bytes(b"path\n\xe9.png\n")
    source = open_source("list", "train", path=str(tmp_path / "a.csv"))
    np.testing.assert_array_equal(everything(source, size=(40, 48))["image"][0], picture(3))


# ---- buckets


class InMemory:
    """tf.io.gfile on TensorFlow's ram://, under the name of gs://."""

    inside = staticmethod(lambda x: x.replace("gs://", "ram://") if isinstance(x, str) else x)

    def __getattr__(self, name):
        function = getattr(tf.io.gfile, name)
        outside = lambda x: x.replace("ram://", "gs://") if isinstance(x, str) else x
        call = lambda *args, **options: function(*map(self.inside, args), **options)
        if name == "walk":
            return lambda *args, **options: ((outside(top), *rest) for top, *rest in call(*args, **options))
        return (lambda *args: [*map(outside, call(*args))]) if name == "glob" else call


@pytest.mark.parametrize("form", ["parquet", "webdataset", "list"])
def test_a_bucket_is_read_as_a_disk(tmp_path, monkeypatch, form):
    from etils.epath import backend

    pictures = [encode(picture(k), "PNG") for k in range(4)]
    for k, data in enumerate(pictures):
        write(str(tmp_path / f"images/{k}.png"), data)
    if form == "parquet":
        pq.write_table(pa.table({"image": pictures, "label": [0, 1, 0, 1]}), tmp_path / "train-0.parquet")
    elif form == "webdataset":
        shard(tmp_path, [m for k in range(4) for m in sample_of(k, pictures[k], ".png", k % 2)])
    else:
        write_csv(tmp_path / "train.csv", [("path", "label"), *((f"images/{k}.png", k % 2) for k in range(4))])
    there = open_source(form, "train", path=str(tmp_path))
    bucket, read_file = f"ram://{form}", tf.io.read_file
    for file in (f for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".npz"):
        place = f"{bucket}/{file.relative_to(tmp_path)}"
        tf.io.gfile.makedirs(os.path.dirname(place))
        with tf.io.gfile.GFile(place, "wb") as out:
            out.write(file.read_bytes())
    gfile = tf.io.gfile.GFile
    monkeypatch.setattr(tf.io.gfile, "GFile", lambda path, mode: gfile(InMemory.inside(os.fspath(path)), mode))
    monkeypatch.setattr(backend._TfBackend, "gfile", InMemory())
    monkeypatch.setattr(tf.io, "read_file", lambda path: read_file(tf.strings.regex_replace(path, "^gs://", "ram://")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in (f"gs://{form}", f"gs://{form}/train*"):
        source = open_source(form, "train", path=path)
        assert source.listing() == there.listing()
        found, local = everything(source, size=(40, 48)), everything(there, size=(40, 48))
        for key in local:
            np.testing.assert_array_equal(found[key], local[key])


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset", "list"])
def test_other_buckets_are_refused_in_one_line(form):
    with pytest.raises(DataError, match="'s3://bucket/x'.*mounted .*or copied to a disk first") as said:
        open_source(form, "train", path="s3://bucket/x")
    assert "\n" not in str(said.value)
