"""Decoding by value as PIL does, files that cannot be read, EXIF, thin and huge images, and mutated files."""

import dataclasses
import io
import logging
import os
import random
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from mim_jax.data import augment, decoding, pil_bicubic, placed
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.decoding import Decoding
from mim_jax.data.pipeline import TrainBatches, eval_batches
from mim_jax.data.source import Source
from mim_jax.data.sources import open_source
from mim_jax.data.unreadable import Reading

UPRIGHT = Decoding(exif="apply")


def picture(seed, height=40, width=48):
    """A smooth colour image uint8 [h w 3]; smooth, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def encoded(image, fmt, mode=None, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, fmt, **options)
    return stream.getvalue()


def filled(folder, files):
    """{name: bytes} -> the folder as a string, with these files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def training(source, **options):
    options = {"batch_size": 4, "size": (16, 16), "crop": RandomCrop(), "seed": 5, **options}
    return TrainBatches(source, **options)


def evaluated(source, **options):
    batches = list(eval_batches(source, **{"batch_size": 4, "size": (16, 16), "resize_ratio": 1.0, **options}))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


# ---- by value


def alpha(image):
    """RGBA whose alpha says nothing of the colours below it."""
    return np.dstack([image, np.random.default_rng(0).integers(0, 256, image.shape[:2], dtype=np.uint8)])


def adobe(data, transform):
    """A CMYK JPEG with the given colour transform in its Adobe marker: 0 CMYK, 2 YCCK; None: without the marker."""
    at = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    if transform is None:
        return data[:at] + data[at + 2 + length :]
    return data[: at + 13] + bytes([transform]) + data[at + 14 :]


def png16(image):
    """A PNG of 16 bits per colour, which PIL only reads: the low byte is noise."""
    low = np.random.default_rng(1).integers(0, 256, image.shape, dtype=np.uint8)
    rows = np.stack([image, low], -1).reshape(len(image), -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GRAY16 = (np.arange(40 * 48).reshape(40, 48) * 34).astype(np.uint16)
KINDS = {
    "rgb.jpg": lambda x: encoded(x, "JPEG"),
    "444.jpg": lambda x: encoded(x, "JPEG", subsampling=0),
    "422.jpg": lambda x: encoded(x, "JPEG", subsampling=1),
    "progressive.jpg": lambda x: encoded(x, "JPEG", progressive=True),
    "optimised.jpg": lambda x: encoded(x, "JPEG", optimize=True, restart_marker_blocks=2),
    "gray.jpg": lambda x: encoded(x, "JPEG", "L"),
    "cmyk.jpg": lambda x: encoded(x, "JPEG", "CMYK"),
    "ycck.jpg": lambda x: adobe(encoded(x, "JPEG", "CMYK"), 2),
    "unmarked_cmyk.jpg": lambda x: adobe(encoded(x, "JPEG", "CMYK"), None),
    "several.jpg": lambda x: encoded(x, "MPO", save_all=True, append_images=[Image.fromarray(x[::-1])]),
    "rgb.png": lambda x: encoded(x, "PNG"),
    "gray.png": lambda x: encoded(x, "PNG", "L"),
    "bilevel.png": lambda x: encoded(x, "PNG", "1"),
    "gray_alpha.png": lambda x: encoded(x, "PNG", "LA"),
    "rgba.png": lambda x: encoded(alpha(x), "PNG"),
    "palette.png": lambda x: encoded(x, "PNG", "P"),
    "few_colours.png": lambda x: encoded(Image.fromarray(x).quantize(7), "PNG", bits=4),
    "transparent_palette.png": lambda x: encoded(Image.fromarray(x).quantize(16), "PNG", transparency=3),
    "transparent_colour.png": lambda x: encoded(x, "PNG", transparency=tuple(map(int, x[0, 0]))),
    "sixteen_bits.png": png16,
    "no_end.png": lambda x: encoded(x, "PNG")[:-12],
    "half_an_end.png": lambda x: encoded(x, "PNG")[:-5],
    "animated.png": lambda x: encoded(x, "PNG", save_all=True, append_images=[Image.fromarray(x[::-1])]),
    "rgb.webp": lambda x: encoded(x, "WEBP"),
    "lossless_alpha.webp": lambda x: encoded(alpha(x), "WEBP", lossless=True, exact=True),
    "animated.webp": lambda x: encoded(x, "WEBP", save_all=True, append_images=[Image.fromarray(x[::-1])]),
    "rgb.gif": lambda x: encoded(x, "GIF"),
    "transparent.gif": lambda x: encoded(Image.fromarray(x).quantize(16), "GIF", transparency=2),
    "animated.gif": lambda x: encoded(x, "GIF", save_all=True, append_images=[Image.fromarray(x[::-1])]),
    "rgb.bmp": lambda x: encoded(x, "BMP"),
    "palette.bmp": lambda x: encoded(x, "BMP", "P"),
    "rgba.bmp": lambda x: encoded(alpha(x), "BMP"),
    "rgb.tif": lambda x: encoded(x, "TIFF"),
    "lzw.tif": lambda x: encoded(x, "TIFF", compression="tiff_lzw"),
    "jpeg.tif": lambda x: encoded(x, "TIFF", compression="jpeg"),
    "rgba.tif": lambda x: encoded(alpha(x), "TIFF"),
    "palette.tif": lambda x: encoded(x, "TIFF", "P"),
    "cmyk.tif": lambda x: encoded(x, "TIFF", "CMYK"),
    "float.tif": lambda x: encoded(x, "TIFF", "F"),
    "pages.tif": lambda x: encoded(x, "TIFF", save_all=True, append_images=[Image.fromarray(x[::-1])]),
    "rgb.ppm": lambda x: encoded(x, "PPM"),
    "gray.pgm": lambda x: encoded(x, "PPM", "L"),
    "bilevel.pbm": lambda x: encoded(x, "PPM", "1"),
    "png_called.jpg": lambda x: encoded(x, "PNG"),
}


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_pils(name):
    data = KINDS[name](picture(1))
    pil = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(augment.decode(tf.constant(data), 3), pil)
    gray = np.asarray(Image.fromarray(pil).convert("L"))
    np.testing.assert_array_equal(augment.decode(tf.constant(data), 1)[..., 0], gray)
    for box in ((3, 5, 20, 31), (0, 0, 40, 48), (39, 0, 1, 48)):
        pixels, _, sides, _ = augment.cut_image(data, 3, lambda h, w, box=box: box)
        y, x, h, w = box
        assert tuple(sides) == (40, 48)
        np.testing.assert_array_equal(pixels, pil[y : y + h, x : x + w])


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM"])
def test_of_sixteen_bits_the_high_byte_counts(fmt):
    """PIL's own conversion clips at 255: nearly white."""
    ours = augment.decode(tf.constant(encoded(GRAY16, fmt)), 3)
    np.testing.assert_array_equal(ours, np.repeat((GRAY16 >> 8).astype(np.uint8)[..., None], 3, -1))


def test_the_table_in_the_docs_names_what_is_tested():
    table = os.path.join(os.path.dirname(__file__), "..", "docs", "data.md")
    words = open(table, encoding="utf-8").read()
    for kind in (
        "CMYK",
        "YCCK",
        "16 bit",
        "palette",
        "alpha",
        "animated",
        "progressive",
        "TIFF",
        "PPM",
        "IEND",
        "EXIF",
        "pixels",
    ):
        assert kind in words, kind


# ---- EXIF


def turned(image, orientation, fmt="JPEG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, fmt, exif=exif, **options)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_is_ignored_or_applied_as_pil_does(fmt, orientation):
    data = turned(picture(3), orientation, fmt)
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(augment.decode(tf.constant(data), 3), np.asarray(stored))
    np.testing.assert_array_equal(augment.decode(tf.constant(data), 3, UPRIGHT), upright)
    sides_of, box = upright.shape[:2], (4, 7, 21, 13)
    pixels, _, sides, _ = augment.cut_image(data, 3, lambda h, w: box, UPRIGHT)
    assert tuple(sides) == sides_of
    np.testing.assert_array_equal(pixels, upright[4:25, 7:20])


def test_exif_reaches_training_and_evaluation(tmp_path):
    x = picture(2, 60, 90)
    plain = filled(
        tmp_path / "plain",
        {"a.png": encoded(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned(x, 6, "PNG"))))), "PNG")},
    )
    noted = filled(tmp_path / "noted", {"a.png": turned(x, 6, "PNG")})
    options = dict(size=(24, 20), batch_size=1)
    trained = lambda source, how: training(source, reading=Reading(how), **options).batch(3)["image"]
    judged = lambda source, how: evaluated(source, reading=Reading(how), **options)["image"]
    for made in (trained, judged):
        want = made(open_source("folder", "train", path=plain), Decoding())
        np.testing.assert_array_equal(made(open_source("folder", "train", path=noted), UPRIGHT), want)
        assert (made(open_source("folder", "train", path=noted), Decoding()) != want).any()


# ---- thin and huge


@pytest.mark.parametrize("shape", [(1, 1500), (3000, 1), (20, 450), (300, 23), (31, 451)])
@pytest.mark.parametrize("size, ratio", [((64, 64), 0.875), ((32, 96), 1.0), ((37, 41), 0.9)])
def test_of_a_thin_image_only_the_centre_is_resized(shape, size, ratio, monkeypatch):
    example = {"image": tf.constant(picture(4, *shape)), "label_map": tf.reshape(tf.range(shape[0] * shape[1]), shape)}
    ours = augment.eval_example(example, size, ratio, 3)
    monkeypatch.setattr(augment, "THIN", 10**9)
    whole = augment.eval_example(example, size, ratio, 3)
    np.testing.assert_array_equal(ours["label_map"], whole["label_map"])
    np.testing.assert_array_equal(ours["image"], whole["image"])


def test_a_thin_image_takes_the_memory_of_the_output(monkeypatch):
    make = tf.function(lambda image: augment.eval_example({"image": image}, (224, 224), 0.875, 3)["image"])
    assert (make(tf.fill([1, 65500, 3], tf.constant(9, tf.uint8))).numpy() == 9).all()  # 12 billion pixels once resized whole
    made, resize = [], pil_bicubic.bicubic
    monkeypatch.setattr(pil_bicubic, "bicubic", lambda *a, **k: made.append(resize(*a, **k)) or made[-1])
    placed.window(placed.PLACED["image"], tf.zeros([1, 90, 3], tf.uint8), (1, 90), (256, 23040), (16, 11408, 224, 224))
    assert [pixels.shape for pixels in made] == [(224, 224, 3)]


def huge(fmt):
    """A few bytes that promise 20,000 x 20,000 pixels."""
    data = encoded(picture(0), fmt)
    if fmt == "PNG":
        header = b"IHDR" + struct.pack(">II", 20000, 20000) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if fmt == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", 20000, 20000) + data[at + 4 :]
    if fmt == "BMP":
        return data[:18] + struct.pack("<ii", 20000, 20000) + data[26:]
    return data[:6] + struct.pack("<HH", 20000, 20000) + data[10:]  # GIF


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "BMP", "GIF"])
def test_one_limit_on_pixels(fmt):
    assert 20000 * 20000 > decoding.MOST_PIXELS > 13000 * 13000
    data = huge(fmt)
    for read in (lambda: augment.decode(tf.constant(data), 3), lambda: augment.cut_image(data, 3, lambda h, w: (0, 0, 1, 1))):
        with pytest.raises(Exception, match=r"limit of 178956970|pixels"):
            read()


# ---- files that cannot be read

GOOD = {f"{k:02}.{'jpg' if k % 2 else 'png'}": encoded(picture(k), "JPEG" if k % 2 else "PNG") for k in range(12)}
CUT = encoded(picture(9, 300, 300), "JPEG")[:2000]
BAD = {"empty": b"", "text": b"no image", "cut": CUT, "header": b"\xff\xd8\xff\xe0 no jpeg", "huge": huge("PNG")}


@pytest.fixture
def mostly_good(tmp_path):
    """12 images and 5 of another kind; one more file will be gone."""
    files = {**GOOD, **{f"{k}_bad.jpg": data for k, data in BAD.items()}, "gone.jpg": GOOD["01.jpg"]}
    source = open_source("folder", "train", path=filled(tmp_path, files))
    os.remove(tmp_path / "gone.jpg")
    return source


LENIENT = lambda: Reading(limit=0.5)  # noqa: E731


def test_unreadable_images_are_replaced_and_named_once(mostly_good, caplog):
    run = training(mostly_good, reading=LENIENT())
    bad = {i for i in range(18) if "bad" in mostly_good.describe(i) or "gone" in mostly_good.describe(i)}
    assert len(bad) == 6
    with caplog.at_level(logging.WARNING, logger="absl"):
        seen = [run.batch(step) for step in range(18)]  # four epochs
    ids = np.concatenate([batch["id"] for batch in seen])
    assert not bad & set(ids.tolist()) and all(set(batch) == {"image", "label", "id"} for batch in seen)
    assert set(run.reading.met) == bad
    for i in bad:
        assert sum(mostly_good.describe(i) in message for message in caplog.messages) == 1
    assert any("it is empty" in message for message in caplog.messages)
    assert any("limit of 178956970" in message for message in caplog.messages)
    run.close()


def test_replacement_is_a_function_of_seed_epoch_and_id(mostly_good):
    whole = training(mostly_good, reading=LENIENT())
    sequence = [whole.batch(step) for step in range(9)]
    for step in (7, 0):  # another run, another order, each from its start
        again = training(mostly_good, reading=LENIENT()).batch(step)
        for key in again:
            np.testing.assert_array_equal(again[key], sequence[step][key])
    parts = [training(mostly_good, reading=LENIENT(), process=(p, 2)) for p in range(2)]
    for step in range(5):
        slices = [part.batch(step) for part in parts]
        for key in slices[0]:
            np.testing.assert_array_equal(np.concatenate([s[key] for s in slices]), sequence[step][key])


def test_good_images_are_not_touched_by_bad_ones(mostly_good, tmp_path):
    clean = open_source(
        "folder", "train", path=filled(tmp_path / "clean", {**GOOD, **{f"z{k}.png": GOOD["00.png"] for k in range(6)}})
    )
    assert clean.num_examples == mostly_good.num_examples  # the same order
    same = {i: os.path.basename(clean.describe(i)) for i in range(18)}
    ours, theirs = training(mostly_good, reading=LENIENT()), training(clean)
    compared = 0
    for step in range(6):
        a, b = ours.batch(step), theirs.batch(step)
        for k in range(4):
            if a["id"][k] == b["id"][k] and same[a["id"][k]] == os.path.basename(mostly_good.describe(a["id"][k])):
                np.testing.assert_array_equal(a["image"][k], b["image"][k])
                compared += 1
    assert compared > 10


def test_a_limit_ends_the_run_with_the_names(mostly_good):
    run = training(mostly_good, reading=Reading(limit=0.1))  # 2 of 18
    with pytest.raises(DataError, match=r"(?s)[3-6] of the 18 images.*data.bad_limit=0.1 lets pass \(2\)") as failure:
        for step in range(18):
            run.batch(step)
    assert len(run.reading.met) > 2 and all(name in str(failure.value) for name, *_ in run.reading.met.values())
    assert "delete" not in str(failure.value)
    with pytest.raises(DataError, match="data.bad_limit=1.5"):
        Reading(limit=1.5)


@pytest.mark.parametrize("processes", [1, 2])
def test_in_evaluation_a_bad_image_counts_as_not_there(mostly_good, processes, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        parts = [evaluated(mostly_good, reading=LENIENT(), process=(p, processes)) for p in range(processes)]
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    valid, unread = found["valid"], ~found["valid"] & (found["id"] >= 0)
    assert valid.sum() == 12 and unread.sum() == 6
    assert sorted(found["id"][valid | unread].tolist()) == list(range(18))
    assert not found["image"][~valid].any() and (found["label"][~valid] == -1).all()
    assert any("could not be read and count as not there" in message for message in caplog.messages)
    for image, i in zip(found["image"][valid], found["id"][valid]):
        alone = augment.eval_example({"image": tf.io.read_file(mostly_good.describe(i))}, (16, 16), 1.0, 3)
        np.testing.assert_array_equal(image, alone["image"])


def test_a_second_evaluation_names_nothing_again(mostly_good, caplog):
    reading = LENIENT()
    first = evaluated(mostly_good, reading=reading)
    assert sum(message.startswith("unreadable, number") for message in caplog.messages) == 6
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        second = evaluated(mostly_good, reading=reading)
    assert not any(message.startswith("unreadable, number") for message in caplog.messages)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize("limit", [0.1, 1.0])
def test_files_out_of_reach_are_not_called_broken(tmp_path, limit):
    source = open_source("folder", "train", path=filled(tmp_path / "here", GOOD))
    run = training(source, reading=Reading(limit=limit))
    run.batch(0)
    os.rename(tmp_path / "here", tmp_path / "there")
    for read in (lambda: run.batch(100), lambda: evaluated(source, reading=Reading(limit=limit))):
        with pytest.raises(DataError, match="(?s)cannot be reached: has a folder been moved or renamed.*NFS") as failure:
            read()
        assert "delete" not in str(failure.value) and "broken" not in str(failure.value)
    os.rename(tmp_path / "there", tmp_path / "here")
    assert run.batch(100)["image"].shape == (4, 16, 16, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed(Source):
    """The files of a folder without random access, as TFRecord is read."""

    random_access = False
    files: tf.Tensor = None

    def load(self, item):
        return {"image": item, "label": tf.constant(-1)}

    def stream(self, low, high, seed=None):
        ds = tf.data.Dataset.range(low, high).map(lambda i: (i, self.files[i]))
        return ds if seed is None else ds.shuffle(100, seed=tf.cast(seed[0], tf.int64), reshuffle_each_iteration=False)


def test_replacement_without_random_access():
    files = [*GOOD.values(), b"", CUT]
    source = Streamed("streamed", "train", len(files), (), 3, False, files=tf.constant(files))
    run = training(source, reading=LENIENT())
    sequence = [run.batch(step) for step in range(7)]
    assert set(run.reading.met) == {12, 13} and not {12, 13} & set(np.concatenate([b["id"] for b in sequence]).tolist())
    for key, values in training(source, reading=LENIENT()).batch(5).items():
        np.testing.assert_array_equal(values, sequence[5][key])
    found = evaluated(source, reading=LENIENT())
    assert found["valid"].sum() == 12


# ---- mutated files

SEEDS = (
    "rgb.jpg",
    "progressive.jpg",
    "cmyk.jpg",
    "rgb.png",
    "palette.png",
    "rgb.webp",
    "animated.gif",
    "rgb.bmp",
    "lzw.tif",
    "rgb.tif",
)


def mutated(rng, wholes):
    """One of the files with bytes flipped, a piece cut out or off, or the header of another."""
    data = bytearray(rng.choice(wholes))
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 1:
        data = data[: rng.randrange(len(data))]
    elif how == 2:
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(1, 200)]
    else:
        n = rng.randrange(2, 64)
        data[:n] = rng.choice(wholes)[:n]
    return bytes(data)


def test_mutated_files_end_no_run(tmp_path):
    """Training and evaluation, both twice. Of 5000 files, by hand, where freed memory is not zero:
    FUZZ=5000 FUZZ_SEED=1 MALLOC_PERTURB_=165 python -m pytest tests/test_data_decode.py -k mutated"""
    rng, count = random.Random(int(os.environ.get("FUZZ_SEED", 0))), int(os.environ.get("FUZZ", 300))
    wholes = [KINDS[name](picture(k)) for k, name in enumerate(SEEDS)]
    files = {f"{k:05}.jpg": mutated(rng, wholes) if k % 4 else wholes[k % len(wholes)] for k in range(count)}
    source = open_source("folder", "train", path=filled(tmp_path, files))
    options = dict(batch_size=20, size=(24, 24))
    pair = [training(source, reading=Reading(limit=1.0), **options) for _ in range(2)]
    poison = []
    for step in range(-(-count // 20)):
        poison = [np.full(rng.randrange(1000, 60000), 171, np.uint8) for _ in range(50)]  # freed memory is not zero
        del poison
        a, b = (run.batch(step) for run in pair)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    first, second = (evaluated(source, reading=Reading(limit=1.0), **options) for _ in range(2))
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert sorted(first["id"][first["id"] >= 0].tolist()) == list(range(count))
    assert first["valid"].sum() >= count / 4
