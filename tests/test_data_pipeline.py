"""Crops, resizing and the order of examples."""

import dataclasses
import gc
import io
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mim_jax.data import augment, crops, decoding, placed
from mim_jax.data.augment import DataError
from mim_jax.data.pipeline import TrainBatches, eval_batches
from mim_jax.data.sample import photos
from mim_jax.data.source import ArraySource
from mim_jax.data.sources import open_source


@pytest.fixture(scope="module")
def numbered():
    """A source of n images whose every pixel is their id; labels are ids modulo 7."""

    def make(n, side=8):
        images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, side, side, 3))
        return ArraySource(
            "numbered",
            "train",
            n,
            tuple("abcdefg"),
            3,
            images=tf.constant(images),
            labels=tf.constant(np.arange(n, dtype=np.int32) % 7),
        )

    return make


@pytest.fixture(scope="module")
def photo():
    """A real colour photograph, uint8 [h w 3]."""
    import skimage

    return np.asarray(Image.open(os.path.join(os.path.dirname(skimage.__file__), "data/chelsea.png")).convert("RGB"))


@pytest.fixture(scope="module")
def tiles():
    return open_source("sample", "train")


def batches(source, **options):
    options = {"batch_size": 8, "size": (8, 8), "crop": augment.RandomCrop(), "seed": 1, **options}
    return TrainBatches(source, **options)


def ids(source, steps, **options):
    run = batches(source, **options)
    return np.concatenate([run.batch(k)["id"] for k in steps])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- order


def test_batch_is_a_function_of_the_step(tiles):
    run = batches(tiles, size=(32, 32))
    sequence = [run.batch(k) for k in range(16)]  # 128 of 106 images: into the second epoch
    jumper = batches(tiles, size=(32, 32))
    for step in (14, 3, 4, 0, 0, 13):
        assert_same(jumper.batch(step), sequence[step])
    run.close()
    assert_same(run.batch(16), batches(tiles, size=(32, 32)).batch(16))


def test_batch_types(tiles):
    batch = batches(tiles, size=(24, 40)).batch(0)
    assert batch["image"].shape == (8, 24, 40, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and batch["id"].dtype == np.int64


@pytest.mark.parametrize("processes", [2, 4])
def test_slices_are_the_batch(tiles, processes):
    whole = batches(tiles, size=(32, 32))
    parts = [batches(tiles, size=(32, 32), process=(p, processes)) for p in range(processes)]
    for step in (0, 1, 13):
        slices = [part.batch(step) for part in parts]
        assert_same(whole.batch(step), {k: np.concatenate([s[k] for s in slices]) for k in slices[0]})


@pytest.mark.parametrize("n", [1, 2, 13, 50])
def test_epochs_are_permutations(numbered, n):
    # batch 8 divides none of these, and 8 > n for some
    order = ids(numbered(n), range(-(-3 * n // 8)))
    epochs = [order[e * n : (e + 1) * n].tolist() for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n >= 13:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))


def test_label_and_pixels_follow_the_id(numbered):
    batch = batches(numbered(50)).batch(3)
    np.testing.assert_array_equal(batch["label"], batch["id"] % 7)
    assert (batch["image"] == batch["id"][:, None, None, None]).all()


def test_seed_changes_order_and_crops(tiles):
    assert ids(tiles, range(3)).tolist() != ids(tiles, range(3), seed=2).tolist()
    assert ids(tiles, range(1), seed=-1).shape == (8,)
    first, second = (batches(tiles, size=(32, 32), batch_size=106).batch(e) for e in range(2))
    a, b = first["image"][np.argsort(first["id"])], second["image"][np.argsort(second["id"])]
    assert (a != b).any((1, 2, 3)).all()  # each image is cropped anew in each epoch


def test_batch_size_must_be_shared_evenly(numbered):
    with pytest.raises(DataError, match="batch_size=8"):
        batches(numbered(9), process=(0, 3))
    with pytest.raises(DataError, match=r"process=\(2, 2\)"):
        batches(numbered(9), process=(2, 2))


# ---- the end of a stream


@dataclasses.dataclass(frozen=True, eq=False)
class PythonSource(ArraySource):
    """Looks its ids up in Python, as array_record does; once `dropped`, meets the garbage collector there."""

    bulk = True
    dropped: threading.Event = None
    entered: list = None
    left: list = None

    def lookup(self, ids):
        def fetch(wanted):
            self.entered.append(1)
            time.sleep(0.01)
            if self.dropped.is_set():
                gc.collect()
            self.left.append(1)
            return wanted

        return tf.ensure_shape(tf.numpy_function(fetch, [ids], tf.int64), [None])


def test_garbage_collected_in_a_reader_does_not_deadlock(numbered):
    # A thread that destroys the iterator it works for waits for itself; cyclic garbage may get there.
    source = PythonSource(**vars(numbered(200)), dropped=threading.Event(), entered=[], left=[])
    gc.disable()
    gc.freeze()  # what other tests left would make each collection slow
    try:
        run = batches(source, prefetch=100_000)  # reads on and on
        run.batch(0)
        run.cycle, alive = run, weakref.ref(run)
        del run
        source.dropped.set()
        deadline = time.time() + 30
        while time.time() < deadline and (alive() or len(source.entered) > len(source.left)):
            time.sleep(0.05)
        assert not alive(), "never collected"
        assert len(source.entered) == len(source.left), "a reader waits for itself"
    finally:
        gc.unfreeze()
        gc.enable()


def test_streams_are_gone_before_the_interpreter(tmp_path):
    # webp is decoded by PIL in TensorFlow's threads; one that asks for a dead interpreter aborts the process
    Image.new("RGB", (400, 400)).save(tmp_path / "a.webp")
    program = f"""
import atexit, threading
atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name == "data-streams"]))
from mim_jax.data import augment, pipeline, sources
source = sources.open_source("folder", "train", path={str(tmp_path)!r})
run = pipeline.TrainBatches(source, batch_size=4, size=(8, 8), crop=augment.RandomCrop(), seed=0, prefetch=500)
run.batch(0)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n[]\n", 0), done.stderr[-2000:]


# ---- evaluation


@pytest.mark.parametrize(
    "n,batch_size,processes,limit", [(13, 4, 1, 0), (13, 4, 2, 0), (13, 8, 4, 0), (3, 8, 4, 0), (16, 4, 2, 0), (13, 4, 2, 6)]
)
def test_evaluation_sees_each_example_once(numbered, n, batch_size, processes, limit):
    parts = [
        list(
            eval_batches(numbered(n), batch_size=batch_size, size=(8, 8), resize_ratio=1.0, limit=limit, process=(p, processes))
        )
        for p in range(processes)
    ]
    total = limit or n
    assert {len(part) for part in parts} == {-(-total // batch_size)}
    found = []
    for batch in (b for part in parts for b in part):
        valid = batch["valid"]
        assert batch["image"].shape == (batch_size // processes, 8, 8, 3) and valid.dtype == bool
        assert (batch["image"][valid] == batch["id"][valid, None, None, None]).all()
        np.testing.assert_array_equal(batch["label"][valid], batch["id"][valid] % 7)
        assert (batch["id"][~valid] == -1).all() and (batch["label"][~valid] == -1).all()
        assert not batch["image"][~valid].any()
        found += batch["id"][valid].tolist()
    # folders are sorted by class, so a limit spreads over the whole split
    assert sorted(found) == [k * n // total for k in range(total)]


def test_evaluation_checks_its_arguments_at_once(numbered):
    with pytest.raises(DataError, match="resize_ratio"):
        eval_batches(numbered(3), batch_size=4, size=(8, 8), resize_ratio=1.2)


# ---- crops


def crop_box(crop, height, width, u):
    """A plain restatement of torchvision's RandomResizedCrop.get_params for given random numbers."""
    for k in range(10):
        area = height * width * (crop.scale[0] + u[k] * (crop.scale[1] - crop.scale[0]))
        low, high = np.log(crop.ratio)
        ratio = np.exp(low + u[10 + k] * (high - low))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    if width / height < crop.ratio[0]:
        w, h = width, round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w, h = round(height * crop.ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "crop",
    [
        augment.RandomCrop(),
        augment.RandomCrop((0.0225, 0.16), (1, 1)),
        augment.RandomCrop((1, 1), (1.9, 2)),
        augment.RandomCrop((0.9, 1)),
    ],
)
def test_crop_boxes_match_a_restatement(crop):
    rng = np.random.default_rng(0)
    for _ in range(250):
        height, width = (int(v) for v in rng.integers(1, 400, 2))
        u = rng.random(augment.UNIFORMS, dtype=np.float32)
        ours = augment.crop_box(crop, height, width, u)
        assert ours == crop_box(crop, height, width, u.astype(float))
        y, x, h, w = ours
        assert 0 <= y and 0 <= x and 1 <= h and 1 <= w and y + h <= height and x + w <= width


def test_crop_area_and_ratio_keep_their_ranges():
    crop = augment.RandomCrop()
    u = tf.random.stateless_uniform([400, augment.UNIFORMS], [0, 1])
    boxes = np.array([[int(v) for v in augment.crop_box(crop, 500, 400, row)] for row in u])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 200_000, boxes[:, 3] / boxes[:, 2]
    assert 0.195 < area.min() < 0.25 and 0.85 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    assert boxes[:, 0].min() < 10 and (boxes[:, 0] + boxes[:, 2]).max() > 490  # the corners are reached


def test_crop_falls_back_to_the_centre():
    u = np.full(augment.UNIFORMS, 0.5, np.float32)
    box = [int(v) for v in augment.crop_box(augment.RandomCrop((1, 1), (1, 1)), 50, 20, u)]
    assert box == [15, 0, 20, 20]


def test_crop_ranges_are_checked():
    with pytest.raises(DataError, match="scale"):
        augment.RandomCrop(scale=(0.5, 0.2))
    with pytest.raises(DataError, match="ratio"):
        augment.RandomCrop(ratio=(0, 1))


def test_flip_is_a_coin_and_a_mirror(photo):
    example, coins = {"image": tf.constant(photo[:64, :64])}, []
    whole, still = augment.RandomCrop((1, 1), (1, 1)), augment.RandomCrop((1, 1), (1, 1), flip=False)
    for seed in [(0, k) for k in range(12)]:
        coins.append(tf.random.stateless_uniform([augment.UNIFORMS], seed)[-1] < 0.5)
        out = crops.train_example(example, seed, whole, (64, 64), 3)["image"]
        np.testing.assert_array_equal(out, photo[:64, 63::-1] if coins[-1] else photo[:64, :64])
        out = crops.train_example(example, seed, still, (64, 64), 3)["image"]
        np.testing.assert_array_equal(out, photo[:64, :64])
    assert any(coins) and not all(coins)


# ---- pixels


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (37, 37), (640, 500), (300, 100)])
def test_resize_is_pils_bicubic(photo, size):
    ours = placed.bicubic(tf.constant(photo), size).numpy().astype(int)
    pil = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.BICUBIC))
    assert np.abs(ours - pil).max() <= 2


def test_small_tiles_resize_as_pils(tiles):
    for k in range(0, 106, 10):
        block = tiles.images[k].numpy()
        for side, size in ((19, 32), (51, 32)):
            ours = placed.bicubic(tf.constant(block[:side, :side]), (size, size)).numpy()[..., 0].astype(int)
            pil = np.asarray(Image.fromarray(block[:side, :side, 0]).resize((size, size), Image.BICUBIC))
            assert np.abs(ours - pil).max() <= 2


def test_right_size_is_not_resampled(photo):
    cut = tf.constant(photo[:64, :96])
    for ratio in (1.0, 0.875):
        np.testing.assert_array_equal(augment.eval_example({"image": cut}, (64, 96), ratio, 3)["image"], cut)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_training_crop_matches_pil(photo, fmt):
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, fmt)
    crop, whole = augment.RandomCrop(flip=False), decoding.Decoding(shrink=False)
    for k in range(5):
        u = tf.random.stateless_uniform([augment.UNIFORMS], [3, k])
        y, x, h, w = (int(v) for v in augment.crop_box(crop, *photo.shape[:2], u))
        pil = Image.open(stream).crop((x, y, x + w, y + h)).resize((112, 112), Image.BICUBIC)
        ours = crops.train_example({"image": tf.constant(stream.getvalue())}, [3, k], crop, (112, 112), 3, whole)["image"]
        assert np.abs(ours.numpy().astype(int) - np.asarray(pil)).max() <= 2


@pytest.mark.parametrize("transposed", [False, True])
def test_evaluation_crop_is_torchvisions(photo, transposed):
    image = photo.transpose(1, 0, 2) if transposed else photo
    height, width = image.shape[:2]
    short = 256 / min(height, width)
    new_h, new_w = (256 if side == min(height, width) else int(side * short) for side in (height, width))
    top, left = round((new_h - 224) / 2), round((new_w - 224) / 2)
    pil = Image.fromarray(image).resize((new_w, new_h), Image.BICUBIC).crop((left, top, left + 224, top + 224))
    ours = augment.eval_example({"image": tf.constant(image)}, (224, 224), 0.875, 3)["image"].numpy().astype(int)
    assert np.abs(ours - np.asarray(pil)).max() <= 2


@pytest.mark.parametrize("size", [(100, 30), (30, 100), (333, 201)])
def test_evaluation_of_rectangles_covers_them(photo, size):
    assert augment.eval_example({"image": tf.constant(photo)}, size, 1.0, 3)["image"].shape == (*size, 3)
    flat = tf.fill([50, 70, 3], tf.constant(200, tf.uint8))
    assert (
        augment.eval_example({"image": flat}, size, 0.875, 3)["image"].numpy() == 200
    ).all()  # nothing from outside the image


def test_gray_is_itu_601(photo):
    ours = augment.to_channels(photo, 1)[..., 0]
    np.testing.assert_array_equal(ours, np.asarray(Image.fromarray(photo).convert("L")))


def test_sample_crops_stay_in_their_block(tiles):
    # The smallest crops of a 128-px block have side 19, the largest 51.
    u = tf.random.stateless_uniform([100, augment.UNIFORMS], [0, 2])
    sides = {int(augment.crop_box(augment.RandomCrop((0.0225, 0.16), (1, 1)), photos.BLOCK, photos.BLOCK, row)[2]) for row in u}
    assert min(sides) >= 19 and max(sides) <= 51
