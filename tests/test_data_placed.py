"""What has a place in the image goes where the image goes; what has none travels unchanged."""

import dataclasses
import fractions
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mim_jax.data import placed
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.pipeline import TrainBatches, eval_batches
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.source import Source

SIDES = [(90, 120), (120, 90), (48, 64), (70, 70), (150, 61), (101, 199), (64, 48)]  # height, width
SIZE = (48, 64)


def colours(h, w):
    """-> uint8 [h w 3]: red is the column, green the row."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped(Source):
    """Images whose colour says where each pixel lies, and a label map that says the same: 256 row + column."""

    files: tf.Tensor = None  # string [n]; without them the images are arrays
    map_shape: tuple = ()  # (1,) for maps [h w 1]

    def load(self, item):
        h, w = tf.unstack(tf.constant(SIDES)[item])
        x, y = tf.meshgrid(tf.range(w), tf.range(h))
        image = tf.cast(tf.stack([x, y, 0 * x], -1), tf.uint8) if self.files is None else self.files[item]
        label_map = tf.reshape(256 * y + x, [h, w, *self.map_shape])
        return {"image": image, "label": tf.cast(item, tf.int32) % 3, "label_map": label_map, "source_id": item + 1000}


def opened(form="array", kind=Mapped, **fields):
    if form != "array":
        streams = [io.BytesIO() for _ in SIDES]
        for stream, (h, w) in zip(streams, SIDES):
            Image.fromarray(colours(h, w)).save(stream, form, **dict(quality=100, subsampling=0) if form == "JPEG" else {})
        fields["files"] = tf.constant([stream.getvalue() for stream in streams])
    return kind("mapped", "train", len(SIDES), tuple("abc"), 3, **fields)


def training(source, **options):
    return TrainBatches(source, **{**dict(batch_size=8, size=SIZE, crop=RandomCrop((0.1, 1)), seed=3), **options})


def evaluated(source, **options):
    return list(eval_batches(source, **{**dict(batch_size=4, size=SIZE, resize_ratio=0.875), **options}))


def assert_agree(images, maps, form):
    """The image tells the same places as the map: to half a pixel, and what uint8 and JPEG round off."""
    assert maps.dtype == np.int32 and maps.shape[:3] == images.shape[:3]
    y, x = np.divmod(maps.reshape(images.shape[:3]), 256)
    wrong = images[..., :2].astype(int) - np.stack([x, y], -1)
    inside = wrong[:, 8:-8, 8:-8]  # bicubic bends a ramp at its ends
    assert np.abs(inside).max() <= (3 if form == "JPEG" else 1)
    assert np.abs(inside.mean((0, 1, 2))).max() < 0.15  # no shift


@pytest.mark.parametrize("form, map_shape", [("array", ()), ("JPEG", (1,)), ("PNG", ())])
def test_maps_follow_through_training(form, map_shape):
    source = opened(form, map_shape=map_shape)
    whole, parts = training(source), [training(source, process=(p, 2)) for p in range(2)]
    rising = []
    for step in range(4):
        batch, slices = whole.batch(step), [part.batch(step) for part in parts]
        assert batch.keys() == {"image", "label", "label_map", "source_id", "id"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([s[key] for s in slices]))
        assert batch["label_map"].shape == (8, *SIZE, *map_shape)
        assert_agree(batch["image"], batch["label_map"], form)
        np.testing.assert_array_equal(batch["source_id"], batch["id"] + 1000)
        columns = batch["label_map"].reshape(8, *SIZE) % 256
        rising += (columns[:, 0, 0] < columns[:, 0, -1]).tolist()
    assert 8 < sum(rising) < 24  # some are mirrored


@pytest.mark.parametrize("ratio", [1.0, 0.875])
@pytest.mark.parametrize("form, map_shape", [("array", (1,)), ("JPEG", ()), ("PNG", ())])
def test_maps_follow_through_evaluation(form, map_shape, ratio):
    source, seen = opened(form, map_shape=map_shape), []
    for p in range(2):
        for batch in evaluated(source, resize_ratio=ratio, process=(p, 2)):
            valid = batch["valid"]
            assert batch.keys() == {"image", "label", "label_map", "source_id", "id", "valid"}
            assert batch["label_map"].shape == (2, *SIZE, *map_shape)
            seen += batch["id"][valid].tolist()
            np.testing.assert_array_equal(batch["source_id"][valid], batch["id"][valid] + 1000)
            for image, label_map, i in zip(batch["image"][valid], batch["label_map"][valid], batch["id"][valid]):
                assert_agree(image[None], label_map[None], form)
                if SIDES[i] == SIZE:  # stays as it is
                    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
                    np.testing.assert_array_equal(label_map.reshape(SIZE), 256 * y + x)
    assert sorted(seen) == list(range(len(SIDES)))


def test_padding_is_per_key():
    whole = evaluated(opened(), batch_size=8)[0]
    nothing = evaluated(opened(), batch_size=4, limit=1, process=(1, 2))[0]  # a process without an example
    assert whole["valid"].tolist() == [True] * 7 + [False] and not nothing["valid"].any()
    for batch, rows in ((whole, slice(7, 8)), (nothing, slice(0, 2))):
        for key, value in {"image": 0, "label": -1, "label_map": 255, "source_id": 0, "id": -1, "valid": False}.items():
            assert batch[key].dtype == whole[key].dtype and (batch[key][rows] == value).all(), key


@pytest.mark.parametrize("old, new", [(7, 7), (40, 13), (13, 40), (64, 32), (32, 64), (1, 5), (150, 61), (9, 1)])
def test_nearest_is_what_lies_at_the_centre(old, new):
    centres = [(i + fractions.Fraction(1, 2)) * fractions.Fraction(old, new) for i in range(new)]  # pixels are 1 wide
    ours = placed.nearest(tf.range(old)[None] + tf.zeros([3, 1], tf.int32), (3, new)).numpy()
    np.testing.assert_array_equal(ours, [[int(c) for c in centres]] * 3)
    row = Image.fromarray(np.arange(old, dtype=np.uint8)[None])
    np.testing.assert_array_equal(ours[:1], np.asarray(row.resize((new, 1), Image.Resampling.NEAREST)))


def test_a_map_of_another_size_is_refused():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Short(Mapped):
        def load(self, item):
            example = super().load(item)
            return {**example, "label_map": example["label_map"][tf.cast(item == 3, tf.int32) :]}

    for form in ("array", "JPEG"):
        with pytest.raises(DataError, match=r"example 3 of 'mapped'.*label_map is of height and width\] \[69 70\]"):
            training(opened(form, Short)).batch(0)
        with pytest.raises(DataError, match="example 3 of 'mapped'.*label_map is of height and width"):
            evaluated(opened(form, Short))


def test_a_key_of_many_shapes_makes_no_batch():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Listed(Mapped):
        def load(self, item):
            return {**super().load(item), "names": tf.range(item)}

    with pytest.raises(DataError, match="'names' of the examples is .*pad it"):
        training(opened(kind=Listed)).batch(0)


def test_randaugment_moves_no_map():
    policy = RandAugment(layers=2, magnitude=9.0, std=0.5, fill=(0, 0, 0))
    with pytest.raises(DataError, match="examples have label_map: set data.randaugment.layers=0"):
        training(opened(), augment=policy).batch(0)


class Points:
    """[k 2], rows and columns from the corner of the image in pixels: another kind, by its four functions."""

    def check(self, key, values, sides):
        tf.debugging.assert_shapes([(values, ("k", 2))])

    def cut(self, values, box):
        return values - tf.cast(tf.stack(box[:2]), tf.float32)

    def resize(self, values, sides, size):
        return values * tf.cast(tf.stack(size) / sides, tf.float32)

    def mirror(self, values, sides):
        return tf.stack([values[:, 0], tf.cast(sides[1], tf.float32) - values[:, 1]], -1)


def test_another_kind_is_one_row(monkeypatch):
    monkeypatch.setitem(placed.PLACED, "points", Points())
    there = np.stack(np.mgrid[:90:3, :90:3], -1).reshape(-1, 2).astype(np.float32) + 0.5  # centres of pixels

    @dataclasses.dataclass(frozen=True, eq=False)
    class Pointed(Mapped):
        def load(self, item):
            return {**super().load(item), "points": tf.constant(there)}

    source, inside = opened(kind=Pointed), 0
    for batch in [training(source).batch(0), *evaluated(source)]:
        for image, points in zip(batch["image"], batch["points"]):
            for now, before in zip(points, there):
                y, x = np.floor(now).astype(int)
                if 8 <= y < SIZE[0] - 8 and 8 <= x < SIZE[1] - 8 and image.any():
                    inside += 1  # the image says there where the point was: a step is at most 199 / 48 pixels
                    assert np.abs(image[y, x, 1::-1] - np.floor(before)).max() <= 3
    assert inside > 300
