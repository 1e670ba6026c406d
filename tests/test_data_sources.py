"""Folders, TFDS and their failures."""

import io
import os
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from mim_jax.data import augment, pipeline
from mim_jax.data.augment import DataError
from mim_jax.data.image_folder import check_folder
from mim_jax.data.sources import open_source
from mim_jax.data.unreadable import Reading


def picture(seed, height=40, width=48):
    """A smooth colour image uint8 [h w 3]; smooth, so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def encode(image, fmt, mode="RGB", **options):
    stream = io.BytesIO()
    Image.fromarray(image).convert(mode).save(stream, fmt, **options)
    return stream.getvalue()


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for k, name in enumerate(names):
            fmt = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(os.path.splitext(name)[1].lower(), "JPEG")
            write(str(tmp_path / name), encode(picture(k), fmt))
        return str(tmp_path)

    return make


def everything(source, **options):
    options = {"batch_size": 4, "size": (16, 16), "resize_ratio": 1.0, **options}
    batches = list(pipeline.eval_batches(source, **options))
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


# ---- image folders


def test_class_folders_and_nesting(folder):
    path = folder("train/dog/b.JPG", "train/cat/deep/er/a.png", "train/cat/c.webp", "val/dog/v.jpeg", "notes.txt")
    train = open_source("folder", "train", path=path)
    assert train.class_names == ("cat", "dog") and train.num_examples == 3
    assert [os.path.relpath(train.describe(i), path) for i in range(3)] == [
        "train/cat/c.webp",
        "train/cat/deep/er/a.png",
        "train/dog/b.JPG",
    ]
    assert train.labels.numpy().tolist() == [0, 0, 1]
    # one class only in val, yet numbered as in train
    assert open_source("folder", "validation", path=path).labels.numpy().tolist() == [1]


def test_validation_folder_has_two_names(folder):
    path = folder("train/a/1.png", "train/b/2.png", "validation/b/3.png")
    assert open_source("folder", "validation", path=path).num_examples == 1


def test_class_missing_from_train(folder):
    """Its images are there; who needs their labels is told."""
    path = folder("train/a/1.png", "train/b/2.png", "val/zebra/3.png", "val/b/4.png")
    source = open_source("folder", "validation", path=path)
    assert source.labels.numpy().tolist() == [1, -1]
    with pytest.raises(DataError, match="knn needs labels.*zebra"):
        source.require_labels("knn")


def test_one_class_is_labelled(folder):
    source = open_source("folder", "train", path=folder("all/1.png", "all/2.jpg"))
    assert source.class_names == ("all",) and source.labels.numpy().tolist() == [0, 0]


def test_without_labels(folder):
    source = open_source("folder", "train", path=folder("1.png", "2.jpg"))
    assert (source.num_examples, source.num_classes, source.class_names) == (2, 0, ())
    assert everything(source)["label"].tolist() == [-1] * 4


def test_whole_folder_is_train_only(folder):
    path = folder("a/1.png", "b/2.png")
    assert open_source("folder", "train", path=path).num_classes == 2
    with pytest.raises(DataError, match="it has train.*val"):
        open_source("folder", "validation", path=path)


def test_hidden_files_are_no_images(folder):
    assert open_source("folder", "train", path=folder("a/1.png", "b/2.png", "a/._1.png", ".cache/3.png")).num_examples == 2


def test_empty_folder_counts_what_it_holds(tmp_path):
    write(str(tmp_path / "x.heic"), b"")
    write(str(tmp_path / "y.heic"), b"")
    with pytest.raises(DataError, match=r"2 \.heic"):
        open_source("folder", "train", path=str(tmp_path))


@pytest.mark.parametrize("path", ["", "/nowhere/at/all"])
def test_missing_folder_names_the_three_ways(path):
    with pytest.raises(DataError, match="(?s)data.data_dir.*data.source=folder.*data.source=sample"):
        open_source("folder", "train", path=path)


def test_options_that_do_not_fit():
    with pytest.raises(DataError, match="data.channels=4"):
        open_source("sample", "train", channels=4)
    with pytest.raises(DataError, match="data.path"):
        open_source("imagenet2012", "train", path="/data")


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 no jpeg", None])
def test_broken_files_are_named(folder, content):
    path = folder("a/1.jpg", "a/2.jpg", "b/3.jpg")
    whole = encode(picture(9, 300, 300), "JPEG")
    write(os.path.join(path, "b/broken.jpg"), whole[: len(whole) // 3] if content is None else content)
    assert check_folder(path) == [os.path.join(path, "b/broken.jpg")]
    source = open_source("folder", "train", path=path)
    none = lambda: Reading(limit=0)
    options = dict(batch_size=4, size=(16, 16), crop=augment.RandomCrop(), seed=0)
    with pytest.raises(DataError, match="b/broken.jpg") as failure:
        pipeline.TrainBatches(source, reading=none(), **options).batch(0)
    assert "1.jpg" not in str(failure.value)
    with pytest.raises(DataError, match="b/broken.jpg"):
        everything(source, reading=none())


def test_file_deleted_while_training(folder):
    path = folder("1.jpg", "2.jpg")
    source = open_source("folder", "train", path=path)
    os.remove(os.path.join(path, "2.jpg"))
    assert everything(source)["valid"].tolist() == [True, False, False, False]
    with pytest.raises(DataError, match="2.jpg"):
        everything(source, reading=Reading(limit=0))


# ---- formats


def sixteen_bit(image):
    stream = io.BytesIO()
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(stream, "PNG")
    return stream.getvalue()


FORMATS = {
    "rgb.png": lambda x: encode(x, "PNG"),
    "gray.png": lambda x: encode(x, "PNG", "L"),
    "rgba.png": lambda x: encode(x, "PNG", "RGBA"),
    "palette.png": lambda x: encode(x, "PNG", "P"),
    "rgb.jpg": lambda x: encode(x, "JPEG"),
    "gray.jpg": lambda x: encode(x, "JPEG", "L"),
    "cmyk.jpg": lambda x: encode(x, "JPEG", "CMYK"),
    "rgb.webp": lambda x: encode(x, "WEBP"),
    "rgba.webp": lambda x: encode(x, "WEBP", "RGBA"),
    "palette.bmp": lambda x: encode(x, "BMP", "P"),
    "rgb.gif": lambda x: encode(x, "GIF"),
    "png_called.jpg": lambda x: encode(x, "PNG"),
    "animated.webp": lambda x: encode(x, "WEBP", save_all=True, append_images=[Image.fromarray(x[::-1])]),
}


@pytest.mark.parametrize("channels", [3, 1])
def test_formats_decode_as_pil_does(channels):
    for name, make in FORMATS.items():
        data = make(picture(1))
        ours = augment.decode(tf.constant(data), channels).numpy()
        pil = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        if channels == 1:
            pil = np.asarray(Image.fromarray(pil).convert("L"))[..., None]
        assert ours.shape == (40, 48, channels)
        assert np.abs(ours.astype(int) - pil).max() <= (2 if name == "cmyk.jpg" else 0), name


def test_sixteen_bit_png_keeps_its_high_byte():
    image = picture(2)
    ours = augment.decode(tf.constant(sixteen_bit(image)), 3).numpy()
    np.testing.assert_array_equal(ours, np.repeat(image[..., :1], 3, -1))


def test_every_format_goes_through_training(tmp_path):
    for name, make in FORMATS.items():
        write(str(tmp_path / name), make(picture(1)))
    source = open_source("folder", "train", path=str(tmp_path), channels=1)
    batch = pipeline.TrainBatches(source, batch_size=len(FORMATS), size=(20, 12), crop=augment.RandomCrop(), seed=0).batch(0)
    assert batch["image"].shape == (len(FORMATS), 20, 12, 1)
    assert sorted(batch["id"]) == list(range(len(FORMATS)))


# ---- TFDS

TRAIN, VALIDATION = 12, 6
SYNSETS = ["n01440764", "n01443537", "n01484850"]


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def fake_tars(tmp_path_factory):
    """The two files of the ImageNet site, with 12 + 6 images; pixel [0, 0] of a training image tells its class."""
    folder = tmp_path_factory.mktemp("tars")
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, synset in enumerate(SYNSETS):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for k in range(TRAIN // len(SYNSETS)):
                    image = np.full((40, 48, 3), 100 * c, np.uint8)
                    _add(inner, f"{synset}_{k}.JPEG", encode(image, "JPEG"))
            _add(outer, f"{synset}.tar", stream.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for k in range(1, VALIDATION + 1):
            _add(tar, f"ILSVRC2012_val_{k:08d}.JPEG", encode(picture(k), "JPEG"))
    return str(folder)


@pytest.fixture(scope="session", params=["tfrecord", "array_record"])
def imagenet(request, fake_tars, tmp_path_factory):
    """Data folders prepared by the real TFDS builder, in three shards."""
    data_dir = str(tmp_path_factory.mktemp(request.param))
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format=request.param)
    config = tfds.download.DownloadConfig(manual_dir=fake_tars, num_shards=3)
    builder.download_and_prepare(download_config=config)
    return data_dir, request.param == "array_record"


def train_batches(source, **options):
    options = {"batch_size": 4, "size": (16, 16), "crop": augment.RandomCrop(), "seed": 5, **options}
    return pipeline.TrainBatches(source, **options)


def test_imagenet_trains(imagenet):
    data_dir, random_access = imagenet
    source = open_source("imagenet2012", "train", data_dir=data_dir)
    assert source.random_access == random_access
    assert (source.num_examples, source.num_classes) == (TRAIN, 1000)
    assert source.class_names[:3] == tuple(SYNSETS)
    batches = train_batches(source)
    epochs = [[batches.batch(3 * e + k) for k in range(3)] for e in range(2)]
    orders = [np.concatenate([b["id"] for b in epoch]) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(TRAIN))
    assert orders[0].tolist() != orders[1].tolist() and orders[0].tolist() != list(range(TRAIN))
    for batch in epochs[0]:  # image and label belong together
        np.testing.assert_allclose(batch["image"][:, 0, 0, 0], 100 * batch["label"], atol=2)
    for step in (4, 1):  # a jump gives what the sequence gave
        for name, values in train_batches(source).batch(step).items():
            np.testing.assert_array_equal(values, epochs[step // 3][step % 3][name])


@pytest.mark.parametrize("processes", [2, 4])
def test_imagenet_shards_are_the_epoch(imagenet, processes):
    source = open_source("imagenet2012", "train", data_dir=imagenet[0])
    shards = [[train_batches(source, process=(p, processes)).batch(k)["id"] for k in range(3)] for p in range(processes)]
    assert sorted(np.ravel(shards)) == list(range(TRAIN))


@pytest.mark.parametrize("processes,limit", [(1, 0), (4, 0), (2, 5)])
def test_imagenet_evaluates_once(imagenet, processes, limit):
    source = open_source("imagenet2012", "validation", data_dir=imagenet[0])
    parts = [everything(source, process=(p, processes), limit=limit) for p in range(processes)]
    assert len({len(part["id"]) for part in parts}) == 1
    ids = np.concatenate([part["id"][part["valid"]] for part in parts])
    assert sorted(ids) == list(range(limit or VALIDATION))


def test_imagenet_ids_name_the_same_image(imagenet):
    source = open_source("imagenet2012", "validation", data_dir=imagenet[0])
    seen = everything(source)
    batch = train_batches(source, batch_size=6, crop=augment.RandomCrop((1, 1), (1.2, 1.2), flip=False)).batch(0)
    whole = dict(zip(seen["id"], seen["label"]))
    assert [whole[i] for i in batch["id"]] == batch["label"].tolist()


def test_imagenet_slices(imagenet):
    source = open_source("imagenet2012", "train[4:10]", data_dir=imagenet[0])
    assert source.num_examples == 6
    assert sorted(i for k in range(2) for i in train_batches(source, batch_size=3).batch(k)["id"]) == list(range(6))
    rest = open_source("imagenet2012", "train[:4]+train[10:]", data_dir=imagenet[0])
    labels = np.concatenate([everything(s)["label"] for s in (source, rest)])
    assert sorted(labels[labels >= 0]) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("split", ["nonsense", "train[", "train[a:b]"])
def test_imagenet_unknown_split(imagenet, split):
    with pytest.raises(DataError, match="train, validation"):
        open_source("imagenet2012", split, data_dir=imagenet[0])


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet", "no_such_set"])
def test_missing_dataset_names_the_three_ways(tmp_path, name):
    with pytest.raises(DataError, match="(?s)manual_dir.*data.source=folder.*data.source=sample"):
        open_source(name, "train", data_dir=str(tmp_path))


class Numbered(tfds.core.GeneratorBasedBuilder):
    """A data set whose labels are plain numbers, as people write them who are in a hurry."""

    VERSION = tfds.core.Version("1.0.0")
    LABELS = {"train": [3, 0, 1], "test": [4]}

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": tf.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        rows = lambda labels: ((k, {"image": picture(k), "label": label}) for k, label in enumerate(labels))
        return {split: rows(labels) for split, labels in self.LABELS.items()}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def numbered(request, tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("numbered"))
    Numbered(data_dir=data_dir, file_format=request.param).download_and_prepare()
    return data_dir


def test_whole_numbers_are_labels(numbered):
    source = open_source("numbered", "train", data_dir=numbered)
    assert source.class_names == ("0", "1", "2", "3", "4")  # of all splits, so that a label means the same in each
    rows = everything(source)
    assert sorted(rows["label"][rows["valid"]]) == [0, 1, 3]


def test_numbers_that_are_no_classes(numbered, monkeypatch):
    from mim_jax.data import tfds_source

    tfds_source._integer_classes.cache_clear()
    monkeypatch.setattr(tfds_source, "COUNTED", 3)
    source = open_source("numbered", "train", data_dir=numbered)
    tfds_source._integer_classes.cache_clear()
    assert source.class_names == ()
    with pytest.raises(DataError, match="knn needs labels.*'label' has no names, and more than 3 examples"):
        source.require_labels("knn")


def test_the_folder_of_a_version(numbered):
    version = os.path.join(numbered, "numbered", "1.0.0")
    source = open_source("numbered", "train", data_dir=version)
    assert (source.num_examples, source.version) == (3, "numbered/1.0.0")
    with pytest.raises(DataError, match="holds numbered/1.0.0, not data.source='imagenet2012'"):
        open_source("imagenet2012", "train", data_dir=version)


@pytest.mark.parametrize("name", ["huggingface:cifar10", "imagenet2012:9.9.9", "imagenet2012/nowhere"])
def test_what_tfds_cannot_open_is_one_line(tmp_path, name):
    with pytest.raises(DataError, match=f"data.source='{name}'"):
        open_source(name, "train", data_dir=str(tmp_path))


def test_replay_is_logged(imagenet, caplog):
    from absl import logging

    source = open_source("imagenet2012", "train", data_dir=imagenet[0])
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        train_batches(source).batch(4)
    assert ("replays" in caplog.text) == (not imagenet[1])
    if not imagenet[1]:
        assert "epoch 1 and skips 4" in caplog.text
