"""The fast path of training images: PIL's filter to the bit, scaled decoding, crops resized on the device, repeated crops."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from skimage import data as photographs

from mim_jax.clock import Clock
from mim_jax.data import augment, crops, decoding, device_bicubic, object_costs, pil_bicubic, pipeline
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.pipeline import TrainBatches
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.sources import open_source
from mim_jax.data.unreadable import Reading

SIZE = (48, 40)


def jpeg(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven photographs of several shapes, so that no batch size divides them."""
    place = tmp_path_factory.mktemp("photographs")
    for i, (height, width) in enumerate([(90, 120), (200, 150), (60, 60), (300, 420), (50, 200), (130, 131), (44, 47)]):
        photo = Image.fromarray(photographs.astronaut()).resize((width, height), Image.BICUBIC)
        photo.save(place / f"{i}.{'png' if i == 2 else 'jpg'}")
    return open_source("folder", "train", path=str(place))


def batches(source, **options):
    return TrainBatches(source, **{"batch_size": 12, "size": SIZE, "crop": RandomCrop(), "seed": 3, **options})


def pil(pixels, size, box=None):
    """PIL's resize, rows first whatever the version: since 13 it begins with the columns of some images."""
    if pixels.shape[-1] == 2:  # which PIL takes for gray with alpha
        return np.dstack([pil(pixels[..., :1], size, box), pil(pixels[..., 1:], size, box)])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    y, x, h, w = box or (0, 0, *pixels.shape[:2])
    narrow = image.resize((size[1], image.height), Image.BICUBIC, box=(x, 0, x + w, image.height))
    return np.asarray(narrow.resize(size[::-1], Image.BICUBIC, box=(0, y, size[1], y + h))).reshape(*size, -1)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_bicubic_is_pils_to_the_bit(channels):
    rng = np.random.default_rng(channels)
    for _ in range(60):
        height, width, *size = (int(n) for n in rng.integers(1, 120, 4))
        pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
        ours = pil_bicubic.bicubic(pixels, size)
        np.testing.assert_array_equal(ours, pil(pixels, size))
        np.testing.assert_array_equal(pil_bicubic.bicubic(pixels, size, mirror=True), ours[:, ::-1])
        y, x = (int(rng.integers(side)) for side in size)
        h, w = (int(rng.integers(1, side - at + 1)) for side, at in zip(size, (y, x)))
        np.testing.assert_array_equal(pil_bicubic.bicubic(pixels, size, part=(y, x, h, w)), ours[y : y + h, x : x + w])


def test_part_of_an_image_with_fractions_is_pils():
    pixels = photographs.astronaut()[:90, :70]
    box = (3.25, 10.5, 60.75, 41.25)
    np.testing.assert_array_equal(pil_bicubic.bicubic(pixels, (32, 24), of=box), pil(pixels, (32, 24), box))


def test_compiles_where_nothing_can_be_kept(monkeypatch):
    def njit(*signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, signature, options)

    monkeypatch.setattr(pil_bicubic, "njit", njit)
    assert pil_bicubic.compiled("void()")(len) == (len, ("void()",), {"nogil": True})


def test_writes_only_where_the_result_fits():
    pixels = photographs.astronaut()[:50, :40]
    out = np.zeros((20, 30, 3), np.uint8)
    assert pil_bicubic.bicubic(pixels, (20, 30), out=out) is out
    np.testing.assert_array_equal(out, pil(pixels, (20, 30)))
    for wrong in ((20, 29, 3), (21, 30, 3), (20, 30, 1)):
        with pytest.raises(ValueError, match="cannot be written"):
            pil_bicubic.bicubic(pixels, (20, 30), out=np.zeros(wrong, np.uint8))


# ---- several images in one call


@pytest.mark.parametrize("options", [{}, {"unsized": True}, {"repeat": 2}, {"augment": RandAugment(2, 9.0, 0.5, (9, 9, 9))}])
def test_how_many_images_a_call_makes_is_of_no_consequence(folder, monkeypatch, options):
    seen = {}
    for count in (1, 4, 16):  # of 12
        monkeypatch.setattr(pipeline, "SLICE", count)
        run = batches(folder, **options)
        seen[count] = [run.batch(step) for step in (0, 1)]
    careful = batches(folder, **options)
    careful._careful = True
    seen["careful"] = [careful.batch(step) for step in (0, 1)]
    for others in seen.values():
        for batch, first in zip(others, seen[1]):
            assert batch.keys() == first.keys()
            for key in first:
                np.testing.assert_array_equal(batch[key], first[key], err_msg=key)


def test_the_order_is_tensorflows_shuffle_of_each_epoch(folder):
    run, n = batches(folder), folder.num_examples
    for step in (0, 1, 4):
        for place, found in enumerate(run.batch(step)["id"]):
            epoch, i = divmod(step * 12 + place, n)
            seed = pipeline._fold(3, pipeline.ORDER, np.int64(epoch))
            assert found == tf.random.experimental.index_shuffle(np.int64(i), seed, np.int64(n - 1))


def test_arrays_are_taken_over_without_a_copy():
    for _ in range(5):
        made = crops.aligned((3, 7, 5, 3))
        assert made.shape == (3, 7, 5, 3) and made.ctypes.data % crops.ALIGNED == 0 and made.flags.c_contiguous


# ---- scaled decoding


@pytest.mark.parametrize(
    "photo, size", [("astronaut", 200), ("coffee", 170), ("chelsea", 130), ("astronaut", 64), ("rocket", 20)]
)
def test_scaled_decoding_is_close_to_decoding_at_full_size(photo, size):
    """And the crop lies where it should: a shift of a pixel would show in these photographs."""
    pixels = getattr(photographs, photo)()
    data, box = jpeg(pixels), (9, 14, pixels.shape[0] - 20, pixels.shape[1] - 31)
    example = lambda shrink: augment.cut_image(data, 3, lambda h, w: box, decoding.Decoding(shrink=shrink), (size, size))
    seen = {}
    for shrink in (False, True):
        pixels, of, _, _ = example(shrink)
        seen[shrink] = pixels.shape, pil_bicubic.bicubic(pixels, (size, size), of=of).astype(float)
    assert seen[False][0][:2] == box[2:] and seen[True][0][0] <= box[2] // 2 + 2
    assert np.abs(seen[True][1] - seen[False][1]).mean() < 1.5
    shifted = np.abs(np.roll(seen[True][1], 1, axis=1) - seen[False][1]).mean()
    assert shifted > 2 * np.abs(seen[True][1] - seen[False][1]).mean()


def test_small_crops_are_decoded_at_full_size():
    data, size = jpeg(photographs.coffee()), (160, 160)
    pixels, of, _, _ = augment.cut_image(data, 3, lambda h, w: (5, 6, 319, 400), decoding.PLAIN, size)
    assert pixels.shape == (319, 400, 3) and tuple(of) == (0, 0, 319, 400)


def test_turned_photographs_are_decoded_at_full_size():
    how = decoding.Decoding(exif="apply")
    pixels, *_ = augment.cut_image(jpeg(photographs.coffee()), 3, lambda h, w: (0, 0, 400, 600), how, (20, 20))
    assert pixels.shape == (400, 600, 3)


# ---- resized on the device


@pytest.mark.parametrize("scaled", [False, True])
def test_the_device_resizes_as_the_host_does(folder, scaled):
    reading = Reading(decoding.Decoding(shrink=scaled))
    host, device = (batches(folder, unsized=unsized, reading=reading).batch(2) for unsized in (False, True))
    assert device["image"].shape == (12, 96, 80, 3) and device["mirror"].any() and not device["mirror"].all()
    seen = device_bicubic.resized(device, SIZE)
    assert seen.keys() == host.keys() and np.array_equal(seen["id"], host["id"])
    error = np.abs(np.asarray(seen["image"]) - host["image"]).mean((1, 2, 3))
    fits = np.ceil(device["crop"].reshape(-1, 2, 2).sum(1)).max(1) < 80  # the others were brought to fit first
    assert fits.sum() > 3 and error[fits].max() < 0.5 and error.max() < 2


def test_a_batch_of_the_host_is_left_alone(folder):
    batch = batches(folder).batch(0)
    assert device_bicubic.resized(batch, SIZE) is batch


def test_randaugment_needs_the_host(folder):
    with pytest.raises(DataError, match="data.resize='device'"):
        batches(folder, unsized=True, augment=lambda example, seed: example)


# ---- repeated crops


@pytest.mark.parametrize("repeat", [2, 3])
def test_repeated_crops_stand_side_by_side(folder, repeat):
    once = batches(folder, batch_size=12 // repeat)
    again = batches(folder, repeat=repeat)
    for step in (0, 3):  # over the end of an epoch
        ids, firsts = again.batch(step)["id"], once.batch(step)
        np.testing.assert_array_equal(ids, np.repeat(firsts["id"], repeat))
        seen = again.batch(step)["image"].reshape(-1, repeat, *SIZE, 3).astype(int)
        assert np.abs(seen[:, 0] - firsts["image"]).mean() < 3  # decoded whole: the same crop but for scaled decoding
        wide = firsts["id"] == 4  # of the wide one no try fits, so the crop is always its centre
        assert (np.abs(seen[:, 1:] - seen[:, :1]).mean((2, 3, 4))[~wide] > 3).all()


def test_repeated_crops_are_the_same_on_any_number_of_processes(folder):
    whole = batches(folder, repeat=2).batch(1)
    for count in (2, 3):
        parts = [batches(folder, repeat=2, process=(i, count)).batch(1) for i in range(count)]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_repeat_divides_the_share_of_a_process(folder):
    with pytest.raises(DataError, match="data.repeat=4 does not divide the 6 examples"):
        batches(folder, repeat=4, process=(0, 2))


def test_an_unreadable_image_is_replaced_in_all_its_crops(tmp_path):
    for i in range(6):
        Image.fromarray(photographs.coffee()[:80, 40 * i : 40 * i + 80]).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    seen = batches(open_source("folder", "train", path=str(tmp_path)), repeat=2, reading=Reading(limit=0.5)).batch(0)
    np.testing.assert_array_equal(seen["id"][::2], seen["id"][1::2])
    assert 3 not in seen["id"] and len(seen["id"]) == 12


def test_a_run_resizes_on_the_device_and_repeats(run_cli, tmp_path):
    more = "--config.data.resize=device", "--config.data.repeat=2", "--config.total_steps=2", "--config.total_epochs=0"
    found = run_cli("--config=configs/mae_vitb.py:toy", *more, f"--workdir={tmp_path}/run")
    assert found.returncode == 0, found.stderr[-2000:]
    assert "% waited for data" in found.stdout


def test_the_clock_tells_what_share_was_waited(monkeypatch):
    now = iter([0.0, 10.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("mim_jax.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    assert clock.rate(1) == (0, 0)
    with clock.measure("data"):
        pass
    assert clock.rate(6) == (0.5, 0.2)


def test_the_cost_of_images_with_objects_is_of_a_set_that_reads_as_coco(monkeypatch, tmp_path):
    monkeypatch.setattr(object_costs, "IMAGES", 4)
    for name, value in dict(BATCH=2, WARM=1, STEPS=2, ROUNDS=1).items():
        monkeypatch.setattr(object_costs, name, value)
    object_costs.made(str(tmp_path))
    truth = open_source("coco", "train", path=str(tmp_path)).ground_truth()
    assert len(truth["images"]) == 4 and len(truth["annotations"]) == 4 * object_costs.OBJECTS
    for x, y, w, h in (each["bbox"] for each in truth["annotations"]):
        assert 0 <= x < x + w <= 640 and 0 <= y < y + h <= 480 and w > 5 and h > 5
    for path in (str(tmp_path), ""):
        found, asked = object_costs.report(64, path)
        assert asked["size"] == found["size"] == 64 and (found["images"], found["objects_per_image"]) == (
            4,
            object_costs.OBJECTS,
        )
        floor, whole = found["results"]
        assert floor["share_of_floor"] == 1 and whole["part"] == "path_objects"
        assert whole["images_per_second_per_core"] == pytest.approx(1e3 / whole["cpu_ms_per_image"])
