"""Images with objects: COCO's json, large-scale jitter, batches of training and evaluation, the composed scenes."""

import copy
import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from mim_jax.data import coco_annotations, masks, scale_jitter
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.pipeline import TrainBatches, eval_batches
from mim_jax.data.scale_jitter import ScaleJitter
from mim_jax.data.sources import open_source
from mim_jax.data.tfds_objects import NUMBERS
from mim_jax.data.unreadable import Reading
from mim_jax.evaluators import coco_ap

SIDES = {7: (40, 60), 3: (64, 48), 12: (30, 30), 9: (50, 50)}  # image id: height, width
SQUARE = [10, 8, 22, 8, 22, 20, 10, 20]
RUNS = {"size": [64, 48], "counts": [64 * 20 + 10, 12, 52, 12, 64 * 27 - 22]}  # two columns, 20 and 21, of rows 10 .. 21
CATEGORIES = [{"id": 44, "name": "cup"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]


def annotation(number, image, category, **more):
    base = dict(id=number, image_id=image, category_id=category, bbox=[10, 8, 12, 12], area=144, iscrowd=0)
    return base | dict(segmentation=[SQUARE]) | more


def content():
    annotations = [
        annotation(1, 7, 44),
        annotation(2, 3, 1, segmentation=RUNS, bbox=[20, 10, 2, 12], area=24),
        annotation(3, 7, 17, bbox=[30, 8, 12, 12], segmentation=[[x + 20 * (i % 2 == 0) for i, x in enumerate(SQUARE)]]),
        annotation(4, 9, 17, iscrowd=1),
        annotation(5, 12, 1, bbox=[20, 20, 8, 8], segmentation=[]),
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in SIDES.items()]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def written(folder, changed=lambda found: None):
    """A folder as COCO's: annotations/ and two folders of images; `changed` edits the validation json."""
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        found = content()
        if split == "val2017":
            changed(found)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(found))
        (folder / f"annotations/captions_{split}.json").write_text("{}")
        for number, (h, w) in SIDES.items():
            y, x = np.mgrid[:h, :w]
            Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(folder / split / f"{number}.png")
    return str(folder)


def opened(path, split="train"):
    return open_source("coco", split, path=str(path))


def test_ids_with_gaps_are_classes_by_order_and_images_come_by_id(tmp_path):
    source = opened(written(tmp_path))
    assert source.class_names == ("person", "cat", "cup") and source.category_ids == (1, 17, 44)
    assert source.image_ids.tolist() == [3, 7, 9, 12] and source.file_name(1) == "7.png"
    assert [len(source.objects_of(i)) for i in range(4)] == [1, 2, 1, 1]
    learned = source.trainable()
    assert learned.image_ids.tolist() == [3, 7, 12], "the image with a crowd alone is none to learn from"
    assert learned.listing()[1] == b"7.png" and learned.objects_of(2) == source.objects_of(3)
    (box,) = learned.objects_of(2)[0]["segmentation"]
    assert box == [20, 20, 28, 20, 28, 28, 20, 28], "a box stands for the mask that is not there"
    truth = source.ground_truth([1, 2])
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3] and truth["annotations"][2]["iscrowd"] == 1
    assert truth["categories"][1] == {"id": 17, "name": "cat"} and truth["images"][0]["height"] == 40
    part = opened(tmp_path, "train[:50%]+train[50%:]")
    assert part.image_ids.tolist() == source.image_ids.tolist() and part.split == "train[:50%]+train[50%:]"


@pytest.mark.parametrize("layout", ["beside", "images/train", "file"])
def test_other_layouts(layout, tmp_path):
    folder = {"beside": "train", "images/train": "images/train", "file": "photos"}[layout]
    place = {"beside": "train/_annotations.coco.json", "images/train": "train.json", "file": "photos/own.json"}[layout]
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / place).write_text(json.dumps(content()))
    for number, (h, w) in SIDES.items():
        Image.new("RGB", (w, h)).save(tmp_path / folder / f"{number}.png")
    source = opened(tmp_path / place if layout == "file" else tmp_path)
    assert source.num_examples == 4 and source.describe(0) == str(tmp_path / folder / "3.png")


def set_first(key, value):
    return lambda found: found["annotations"][0].update({key: value})


ABSENT = {"id": 99, "file_name": "99.png", "height": 4, "width": 4}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda found: found["images"].append(ABSENT), ["1 of its 5", "99.png"]),
        (set_first("category_id", 5), ["1 of 5 annotations", "category_id", "among its categories: 5"]),
        (set_first("image_id", 123), ["image_id", "among its images: 123"]),
        (set_first("bbox", [1, 2, 3]), ["1 of 5 annotations have a bbox", "(ids 1)"]),
        (set_first("bbox", ["10", 8, 12, 12]), ["have a bbox that is not four finite numbers"]),
        (set_first("bbox", [10, 8, float("nan"), 12]), ["have a bbox that is not four finite numbers"]),
        (set_first("area", float("inf")), ["an area that is no finite number"]),
        (set_first("segmentation", [[*SQUARE[:-1], float("nan")]]), ["1 of 5 annotations have a polygon", "(ids 1)"]),
        (set_first("segmentation", SQUARE), ["have a polygon that is no list"]),
        (set_first("segmentation", {"size": [40, 60]}), ["1 of 5 annotations have an RLE", "(ids 1)"]),
        (set_first("segmentation", {"size": [40, 60], "counts": [1200, 1100]}), ["add up to height x width"]),
        (set_first("segmentation", {"size": [40, 60], "counts": [2500, -100]}), ["none below 0"]),
        (set_first("segmentation", {"size": [40, 60], "counts": "Xo5"}), ["have an RLE that cannot be"]),
        (set_first("segmentation", RUNS), ["mask of annotation 1", "64 x 48", "image 7 is 40 x 60"]),
        (lambda found: found["annotations"].clear(), ["has no annotations"]),
        (lambda found: found.pop("categories"), ["no COCO json", "'categories'"]),
        (lambda found: found["annotations"][0].pop("bbox"), ["no COCO json", "'bbox'"]),
        (lambda found: found["images"].append(found["images"][0]), ["ids of images", "more than once: 7"]),
        (lambda found: found["images"][0].update(id="7"), ["'7' among its images is no whole number"]),
        (lambda found: [i.update(file_name="x" + i["file_name"]) for i in found["images"]], ["names 4 images", "looked in"]),
    ],
)
def test_a_json_that_cannot_be_is_one_line(change, words, tmp_path):
    path = written(tmp_path, change)
    assert opened(path).num_examples == 4
    with pytest.raises(DataError) as error:
        opened(path, "validation")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_is_odd_is_counted(caplog):
    found = content()
    found["annotations"][0]["bbox"] = [10, 8, 0, 12]
    found["annotations"][1]["bbox"] = [90, 10, 2, 12]
    found["annotations"][2]["bbox"][2] = 40
    found["annotations"].append(annotation(6, 7, 1, segmentation=[[1, 1, 2, 2]]))
    with caplog.at_level("WARNING"):
        read = coco_annotations.checked("x.json", *(found[key] for key in ("images", "annotations", "categories")))
    assert len(read.files) == 4 and read.files[0] == "3.png"
    for count, words in ((2, "a box of no area"), (1, "a box that leaves"), (1, "no polygon"), (1, "no mask")):
        assert f"{count} of 6 annotations have {words}" in caplog.text


def test_run_lengths_are_those_that_were_written():
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for h, w, share in ((7, 5, 0.5), (300, 400, 0.002), (1, 1, 2), (2000, 1000, 0), (64, 48, 0.1)):
        bits = np.asfortranarray(rng.random((h, w)) < share).astype(np.uint8, order="F")
        text = mask.encode(bits)["counts"].decode()
        edges = np.flatnonzero(np.diff(bits.ravel("F"), prepend=0, append=2))
        np.testing.assert_array_equal(masks.runs({"counts": text}), np.diff(edges, prepend=0))
        if len(text) > 1:
            with pytest.raises(ValueError):
                masks.runs({"counts": text[:-1] + "o"})


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [7, 7, 7, 8, 8]])
def test_ids_of_annotations_do_not_change_ap(ids, tmp_path):
    path = written(tmp_path, lambda found: [a.update(id=i) for a, i in zip(found["annotations"], ids, strict=True)])
    as_usual, other = (opened(path, split).ground_truth() for split in ("train", "validation"))
    results = [{key: o[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for o in as_usual["annotations"]]
    found = coco_ap.scores(other, results, kinds=("bbox",))
    assert found == coco_ap.scores(as_usual, results, kinds=("bbox",)) and found["box/AP"] == pytest.approx(1.0)


def training(source, **options):
    classes = {number: k for k, number in enumerate(source.category_ids)}
    crop = ScaleJitter(classes, **options.pop("jitter", dict(scale=(0.5, 2.0), objects=3)))
    return TrainBatches(source, **dict(batch_size=4, size=(56, 52), crop=crop, seed=5) | options)


SHAPES = {
    "image": (4, 56, 52, 3, "uint8"),
    "size": (4, 2, "int32"),
    "boxes": (4, 3, 4, "float32"),
    "classes": (4, 3, "int32"),
    "valid": (4, 3, "bool"),
    "instance_masks": (4, 3, 56, 7, "uint8"),
    "id": (4, "int64"),
}


def test_boxes_and_masks_lie_on_what_the_image_shows(tmp_path):
    """Red is the column and green the row of every pixel, so the image tells where an object must be."""
    source = opened(written(tmp_path)).trainable()
    batches, seen = training(source), 0
    for step in range(6):
        batch = batches.batch(step)
        assert {key: (*x.shape, x.dtype.name) for key, x in batch.items()} == SHAPES
        for k in range(4):
            h, w = batch["size"][k]
            assert not batch["image"][k, h:].any() and not batch["image"][k, :, w:].any()
            drawn = np.unpackbits(batch["instance_masks"][k], axis=-1)[:, :, :52]
            assert not drawn[:, h:].any() and not drawn[:, :, w:].any() and not drawn[~batch["valid"][k]].any()
            own = [o for o in source.objects_of(batch["id"][k])]
            for box, c, bits in zip(batch["boxes"][k][batch["valid"][k]], batch["classes"][k], drawn):
                (o,) = [o for o in own if o["category_id"] == source.category_ids[c]]
                x, y, wide, high = o["bbox"]
                red, green = (batch["image"][k, :h, :w, i][bits[:h, :w] > 0].astype(float) for i in (0, 1))
                assert red.min() >= x - 2 and red.max() <= x + wide + 1 and green.min() >= y - 2 and green.max() <= y + high + 1
                left, top, right, low = masks.around(bits)
                assert np.abs(box - [left, top, right, low]).max() < 1, "the box is around the mask"
                seen += 1
    assert seen > 20
    np.testing.assert_array_equal(training(source).batch(3)["instance_masks"], training(source).batch(3)["instance_masks"])
    halves = [training(source, process=(p, 2)).batch(2) for p in (0, 1)]
    whole = training(source).batch(2)
    for key, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), x)


def brute_box(polygon, h, w, step=0.02):
    """The box of what a grid of points finds inside a polygon and the rectangle."""
    y, x = (np.arange(0, side, step) + step / 2 for side in (h, w))
    found = np.array([[masks.inside(polygon, (a, b)) for a in x] for b in y])
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return np.array([x[columns[0]], y[rows[0]], x[columns[-1]], y[rows[-1]]]) if len(rows) else None


POLYGONS = (
    [[-2, -1], [2, 1], [1, 2]],
    [[-5, -5], [9, -5], [9, 9], [-5, 9]],
    [[1, 1], [2, 1], [2, 2]],
    [[5, 5], [6, 5], [6, 6]],
    [[2, 2], [9, 2], [9, 9], [2, 9], [2, 2.5], [8, 8], [8, 2.5]],  # a frame around a corner
    [[3.5, 2.5], [5, 2.5], [5, 4], [3.9, 4]],
)


@pytest.mark.parametrize("polygon", POLYGONS)
def test_the_box_of_a_cut_polygon(polygon):
    polygon, brute = np.array(polygon, float), brute_box(np.array(polygon, float), 3, 4)
    found = masks.clipped_box(polygon, 3, 4)
    assert (found is None) == (brute is None)
    assert found is None or np.abs(found - brute).max() < 0.1


@pytest.mark.parametrize("per_axis,x", [(False, 0), (True, 32)])
def test_a_place_is_drawn_once_or_for_each_axis(per_axis, x):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    draws = [0.9, 1.0, 0.0, 1.0]  # not mirrored, twice the result, at the upper edge; for each axis at the right one
    found = ScaleJitter({}, per_axis=per_axis).see(pixels, "[]", draws, (32, 32))
    np.testing.assert_array_equal(found["image"], pixels[:32, x : x + 32])


def test_an_object_smaller_than_a_pixel_keeps_the_one_it_touches():
    where = scale_jitter.placement((400, 400), (16, 16), False, 0.5, (0, 0))
    objects = [{"iscrowd": 0, "class": 1, "segmentation": [[210, 100, 220, 100, 215, 110]]}]
    found = scale_jitter.moved_objects(objects, where, (16, 16), 2)
    assert found["valid"].tolist() == [True, False]
    assert masks.around(np.unpackbits(found["instance_masks"][0], axis=-1)) == (4, 2, 5, 3)


def test_evaluation_fits_the_longest_side(tmp_path):
    source = opened(written(tmp_path))
    batches = list(eval_batches(source, batch_size=3, size=(32, 32), see=scale_jitter.fitted))
    assert [batch["id"].tolist() for batch in batches] == [[0, 1, 2], [3, -1, -1]]
    assert np.concatenate([b["original_size"] for b in batches]).tolist()[:4] == [[64, 48], [40, 60], [50, 50], [30, 30]]
    assert np.concatenate([b["size"] for b in batches]).tolist() == [[32, 24], [21, 32], [32, 32], [32, 32], [0, 0], [0, 0]]
    assert {*batches[0]} == {"image", "size", "original_size", "id", "valid"}
    red = batches[0]["image"][1, 10, :, 0].astype(float)
    assert np.abs(red - (np.arange(32) + 0.5) * 60 / 32).max() < 1.5 and not batches[0]["image"][1, 21:].any()


def test_broken_images_and_images_of_other_sides_are_named(tmp_path, caplog):
    path = written(tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "train2017/12.png")  # 30 x 30 in the json
    (tmp_path / "train2017/3.png").write_bytes(b"no image")
    source = opened(path).trainable()
    batch = training(source, reading=Reading(limit=1.0)).batch(0)
    assert {*batch["id"].tolist()} == {1}, "the one that is left stands for both"
    assert "12.png" in caplog.text and "its objects were drawn on" in caplog.text and "3.png" in caplog.text
    (batch,) = eval_batches(opened(path), batch_size=4, size=(32, 32), see=scale_jitter.fitted, reading=Reading(limit=1.0))
    assert batch["valid"].tolist() == [False, True, True, False]
    with pytest.raises(DataError, match="cannot be read"):
        list(eval_batches(opened(path), batch_size=4, size=(32, 32), see=scale_jitter.fitted))


def test_objects_are_for_detection(tmp_path):
    source = opened(written(tmp_path))
    with pytest.raises(DataError, match="'objects' of the examples is text"):
        TrainBatches(source, batch_size=2, size=(16, 16), crop=RandomCrop(), seed=0).batch(0)
    with pytest.raises(DataError, match="needs labels.*objects in them have classes"):
        source.require_labels("kNN")
    with pytest.raises(DataError, match="no image has an object"):
        source.take([2]).trainable()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data_dir of coco/2017 as TFDS writes it, of the images and boxes of `content`."""
    folder = tmp_path_factory.mktemp("tfds")
    written(folder / "as_coco")
    coco, found = tfds.object_detection.coco.Coco, content()

    def examples(self, *_):
        label, feature = self.info.features["objects"]["label"], tfds.features.BBox
        label.names = [f"class {k}" for k in NUMBERS]
        for image in reversed(found["images"]):
            own = [a for a in found["annotations"] if a["image_id"] == image["id"]]
            h, w = image["height"], image["width"]
            boxes = [(y / h, x / w, (y + high) / h, (x + wide) / w) for x, y, wide, high in (a["bbox"] for a in own)]
            keys = dict(id="id", area="area", is_crowd="iscrowd")
            objects = [
                {key: a[there] for key, there in keys.items()}
                | {"bbox": feature(*box), "label": NUMBERS.index(a["category_id"])}
                for a, box in zip(own, boxes)
            ]
            name = image["file_name"]
            picture = {"image": str(folder / "as_coco/train2017" / name), "image/filename": name, "image/id": image["id"]}
            yield image["id"], picture | {"objects": objects}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "_split_generators", lambda self, _: {"train": examples(self), "test": examples(self)})
        for file_format in ("array_record", "tfrecord"):
            builder = tfds.builder("coco/2017", data_dir=folder / file_format, file_format=file_format)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(register_checksums=False))
    return folder


def test_coco_of_tfds_has_the_same_boxes(prepared):
    source, json_source = (
        open_source("coco/2017", "train", data_dir=str(prepared / "array_record"), objects=True),
        open_source("coco", "train", path=str(prepared / "as_coco")),
    )
    assert source.class_names[15] == "class 17" and source.category_ids[15] == 17 and len(source.category_ids) == 80
    assert source.image_ids.tolist() == json_source.image_ids.tolist() and source.sides.tolist() == json_source.sides.tolist()
    for i in range(4):
        ours, theirs = source.objects_of(i), json_source.objects_of(i)
        assert [o["category_id"] for o in ours] == [o["category_id"] for o in theirs]
        assert [o["iscrowd"] for o in ours] == [o["iscrowd"] for o in theirs]
        np.testing.assert_allclose([o["bbox"] for o in ours], [o["bbox"] for o in theirs], atol=1e-4)
        assert source.file_name(i) == json_source.file_name(i)
    shown = [x.decoded(x.load(tf.constant(1)), Reading().decoding) for x in (source, json_source)]
    np.testing.assert_array_equal(shown[0]["image"], shown[1]["image"])
    learned = source.trainable()
    assert learned.image_ids.tolist() == [3, 7, 12] and not learned.is_broken(tf.constant(2))
    assert "record" in learned.describe(2) and len(learned.listing()) == 3
    assert [image["id"] for image in source.ground_truth()["images"]] == [3, 7, 9, 12]


def test_coco_of_tfds_needs_random_access(prepared):
    with pytest.raises(DataError, match="stored as tfrecord; of objects array_record is read"):
        open_source("coco/2017", "train", data_dir=str(prepared / "tfrecord"), objects=True)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_who_asks_for_no_objects_has_the_images_of_tfds_alone(prepared, file_format):
    source = open_source("coco/2017", "train", data_dir=str(prepared / file_format))
    assert source.num_examples == 4 and not source.num_classes and not hasattr(source, "objects_of")


def test_scenes_hold_what_their_masks_say():
    source = open_source("scenes", "validation", channels=1)
    assert source.num_examples == 100 and source.num_classes == 6
    for i in range(20):
        taken = np.zeros(source.sides[i], int)
        for o in source.objects_of(i):
            bits = masks.bitmap(o["segmentation"], *source.sides[i])
            x, y, w, h = o["bbox"]
            assert masks.around(bits) == (x, y, x + w, y + h) and o["area"] == bits.sum() > 0
            taken += bits
        assert taken.max() <= 1, "what lies below is not part of an object"
    first = copy.deepcopy(source.images[0])
    open_source.__globals__["scenes"].open_scenes.cache_clear()
    np.testing.assert_array_equal(open_source("scenes", "validation", channels=1).images[0], first)
    assert source.load(tf.constant(3, tf.int64))["image"].shape == (128, 128, 1)
    with pytest.raises(DataError, match="no split 'train_tiles'"):
        open_source("scenes", "train_tiles", channels=1)
