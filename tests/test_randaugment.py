"""RandAugment's operations against plain statements of their levels, its draws, its place in the batches, and its sheet."""

import collections
import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mim_jax.data import pil_transform, pipeline, randaugment
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.pipeline import TrainBatches
from mim_jax.data.randaugment import NAMES, RandAugment
from mim_jax.data.sources import open_source
from mim_jax.figures.augmented import draw_augmented, label

FILL = (124, 116, 104)
NO_LEVEL = ("AutoContrast", "Equalize", "Invert")
LEVELS = (0.0, 0.04, 2.4, 5.0, 8.6, 9.0, 10.0)
H, W = 18, 26


def noise(c, h=H, w=W):
    """Every value occurs, none at both ends of the range in every channel."""
    pixels = np.random.default_rng(c).integers(0, 256, (h, w, c)).astype(np.uint8)
    pixels[..., 0] = 20 + pixels[..., 0] // 2
    return pixels


def smooth(c):
    """Noise with structure, for what should change little at small levels."""
    y, x = np.mgrid[:H, :W]
    return np.stack([128 + 70 * np.sin(x / 4 + k) * np.cos(y / 5 - k) for k in range(c)], -1).astype(np.uint8)


def run(name, pixels, level, sign=1):
    return randaugment.apply(pixels, [(name, level, sign)], FILL[: pixels.shape[-1]])


def luma(pixels):
    """uint8 [h w c] -> [h w]: ITU-R 601, rounded as Pillow does."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0].astype(int)
    return (pixels.astype(int) @ [19595, 38470, 7471] + 32768) // 65536


@pytest.mark.parametrize("c", [1, 3])
def test_compiled_operations_are_pils(c):
    """Bit for bit but where a number that PIL cuts off lies on a whole one."""
    pixels, fill = noise(c, 40, 52), FILL[:c]
    image = Image.fromarray(pixels[..., 0] if c == 1 else pixels)
    colour = fill[0] if c == 1 else fill
    kept = dict(resample=Image.Resampling.BICUBIC, fillcolor=colour)
    pairs = [(pil_transform.sharpened(pixels, f), ImageEnhance.Sharpness(image).enhance(f)) for f in (0.1, 0.7, 1.9)]
    pairs += [(pil_transform.rotated(pixels, d, fill), image.rotate(d, **kept)) for d in (0, 90, 27.3, -11)]
    for matrix in ((1, 0.2, 0, 0, 1, 0), (1, 0, 0, -0.25, 1, 0), (1, 0, 13.3, 0, 1, 0), (1, 0, 0, 0, 1, -8.7)):
        theirs = image.transform(image.size, Image.Transform.AFFINE, matrix, **kept)
        pairs.append((pil_transform.affine(pixels, matrix, fill), theirs))
    for ours, theirs in pairs:
        error = np.abs(ours.astype(int) - np.asarray(theirs).reshape(ours.shape))
        assert error.max() <= 1 and error.mean() < 0.01


# what each operation is, of (values float [h w c], uint8 pixels, level, sign)


def autocontrast(x, pixels, level, sign):
    low, high = x.min((0, 1)), x.max((0, 1))
    return (x - low) * 255 / (high - low)


def equalize(x, pixels, level, sign):
    out = np.zeros_like(x)
    for c in range(x.shape[-1]):
        counts = np.bincount(pixels[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        out[..., c] = np.minimum(255, (step // 2 + before) // step)[pixels[..., c]] if step else x[..., c]
    return out


def posterize(x, pixels, level, sign):
    step = 2 ** (8 - (4 - int(level / 10 * 4)))
    return x // step * step


def solarize(x, pixels, level, sign):
    return np.where(x < 256 - min(256, int(level / 10 * 256)), x, 255 - x)


def solarize_add(x, pixels, level, sign):
    return np.where(x < 128, np.minimum(255, x + min(128, int(level / 10 * 110))), x)


def factor(level, sign):
    return max(0.1, 1 + sign * level / 10 * 0.9)


def colour(x, pixels, level, sign):
    gray = luma(pixels)[..., None]
    return gray + factor(level, sign) * (x - gray)


def contrast(x, pixels, level, sign):
    mean = int(luma(pixels).mean() + 0.5)
    return mean + factor(level, sign) * (x - mean)


def brightness(x, pixels, level, sign):
    return factor(level, sign) * x


def sharpness(x, pixels, level, sign):
    blurred = x.copy()
    for i in range(1, H - 1):
        for j in range(1, W - 1):
            blurred[i, j] = (x[i - 1 : i + 2, j - 1 : j + 2].sum((0, 1)) + 4 * x[i, j]) / 13
    return blurred + factor(level, sign) * (x - blurred)


VALUES = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": lambda x, *_: 255 - x,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": colour,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
GEOMETRY = {  # where a pixel at (x, y) from the corner comes from
    "Rotate": lambda x, y, v: (
        W / 2 + math.cos(v * math.pi / 6) * (x - W / 2) - math.sin(v * math.pi / 6) * (y - H / 2),
        H / 2 + math.sin(v * math.pi / 6) * (x - W / 2) + math.cos(v * math.pi / 6) * (y - H / 2),
    ),
    "ShearX": lambda x, y, v: (x + 0.3 * v * y, y),
    "ShearY": lambda x, y, v: (x, y + 0.3 * v * x),
    "TranslateX": lambda x, y, v: (x + 0.45 * v * W, y),
    "TranslateY": lambda x, y, v: (x, y + 0.45 * v * H),
}


def test_there_are_fifteen():
    assert len(NAMES) == 15 and {*NAMES} == {*VALUES, *GEOMETRY}


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", VALUES)
def test_values_are_the_plain_ones(name, c):
    exact = name in ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
    for pixels in (noise(c), smooth(c), np.full((H, W, c), 77, np.uint8)):
        for level in LEVELS:
            for sign in (1, -1):
                if name == "AutoContrast" and pixels.min() == pixels.max():
                    want = pixels  # nothing to stretch
                else:
                    want = np.clip(VALUES[name](pixels.astype(float), pixels, level, sign), 0, 255)
                found = run(name, pixels, level, sign)
                assert found.shape == pixels.shape and found.dtype == np.uint8
                # Pillow cuts off or rounds, and the blurred image of Sharpness is rounded before it is taken further
                tolerance = 0 if exact else 2.0 if name == "Sharpness" else 1.0
                assert np.abs(found - want).max() <= tolerance, (level, sign)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_moves_a_ramp_as_stated(name, c):
    """Bicubic interpolation is exact on linear images; what comes from outside has the fill colour."""
    ramp = lambda x, y: np.stack([20 + 5 * x + 3 * y, 200 - 3 * x - 2 * y, 90 + 2 * x - y][:c], -1)
    y, x = np.mgrid[:H, :W] + 0.5
    pixels = np.round(ramp(x, y)).astype(np.uint8)
    for level in LEVELS:
        for sign in (1, -1):
            from_x, from_y = GEOMETRY[name](x, y, sign * level / 10)
            depth = np.minimum.reduce([from_x, W - from_x, from_y, H - from_y])  # inside the image
            found = run(name, pixels, level, sign).astype(float)
            wrong = np.abs(found - ramp(from_x, from_y)).max(-1)
            assert wrong[depth > 2].max() <= 2, (level, sign)
            assert (found[depth < -0.01] == FILL[:c]).all(), (level, sign)
            assert (depth < -0.01).any() or level < 1


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_higher_level_changes_more(name, c):
    pixels, levels = smooth(c), np.linspace(0, 10, 9)
    for sign in (1, -1):
        change = [np.abs(run(name, pixels, v, sign).astype(int) - pixels).mean() for v in levels]
        if name in NO_LEVEL or (name == "Color" and c == 1):
            assert len(set(change)) == 1 and (change[0] > 0) == (name != "Color")
        else:
            assert (change[0] == 0) == (name != "Posterize")  # which keeps 4 bits at level 0
            assert change[-1] > change[1] and min(np.diff(change)) > -0.15 * change[-1]


@pytest.mark.parametrize("c", [1, 3])
def test_no_bits_is_black(c):
    assert not run("Posterize", noise(c), 10.0).any() and run("Posterize", noise(c), 9.9).any()


# draws


def test_draws_have_the_stated_frequencies():
    n, augment = 6000, RandAugment(2, 9.0, 0.5, FILL)
    drawn = [augment.draw(seed) for seed in range(n)]
    used = np.bincount([len(each) for each in drawn], minlength=3)
    np.testing.assert_allclose(used, [n / 4, n / 2, n / 4], atol=4.5 * math.sqrt(n / 4))
    every = [op for each in drawn for op in each]
    counts = collections.Counter(name for name, _, _ in every)
    np.testing.assert_allclose([counts[name] for name in NAMES], n / 15, atol=4.5 * math.sqrt(n / 15))
    repeated = np.mean([each[0][0] == each[1][0] for each in drawn if len(each) == 2])
    assert abs(repeated - 1 / 15) < 0.03  # with replacement
    levels = np.array([level for _, level, _ in every])
    assert abs(levels.mean() - 9) < 0.03 and abs(levels.std() - 0.5) < 0.03 and levels.max() == 10
    assert abs(np.mean([sign for _, _, sign in every])) < 4.5 / math.sqrt(n)
    assert abs(np.corrcoef([[each[0][1], each[1][1]] for each in drawn if len(each) == 2], rowvar=False)[0, 1]) < 0.08


@pytest.mark.parametrize("magnitude, std", [(0.0, 2.0), (10.0, 2.0), (5.0, 0.0)])
def test_levels_stay_in_range(magnitude, std):
    levels = [op[1] for seed in range(300) for op in RandAugment(3, magnitude, std, FILL).draw(seed)]
    assert min(levels) >= 0 and max(levels) <= 10 and (len(set(levels)) > 1) == (std > 0)


@pytest.mark.parametrize("c", [1, 3])
def test_an_image_is_a_function_of_pixels_and_seed(c):
    augment, pixels = RandAugment(2, 9.0, 0.5, FILL[:c]), noise(c)
    outs = [augment.change(pixels, seed) for seed in range(40)]
    for seed, out in enumerate(outs):
        np.testing.assert_array_equal(out, augment.change(pixels, np.random.default_rng(seed)))
        np.testing.assert_array_equal(out, randaugment.apply(pixels, augment.draw(seed), FILL[:c]))
        assert out.shape == pixels.shape and out.dtype == np.uint8
    assert len({out.tobytes() for out in outs}) > 20
    np.testing.assert_array_equal(pixels, noise(c))  # not written to


def test_layers_follow_one_another():
    pixels, operations = noise(3), [("Rotate", 9.0, 1), ("Invert", 0.0, 1)]
    found = randaugment.apply(pixels, operations, FILL)
    np.testing.assert_array_equal(found, 255 - run("Rotate", pixels, 9.0))
    assert tuple(found[0, 0]) == tuple(255 - v for v in FILL)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(layers=0), "randaugment.layers=0"),
        (dict(layers=1.5), "randaugment.layers=1.5"),
        (dict(magnitude=11), "randaugment.magnitude=11"),
        (dict(magnitude=float("nan")), "magnitude=nan"),
        (dict(std=-1), "randaugment.std=-1"),
        (dict(fill=(1, 2)), r"fills with \(1, 2\)"),
        (dict(fill=(0.5,)), r"fills with \(0.5,\)"),
        (dict(fill=(256,)), r"fills with \(256,\)"),
    ],
)
def test_settings_outside_their_range_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        RandAugment(**{**dict(layers=2, magnitude=9.0, std=0.5, fill=FILL), **change})


def test_another_number_of_channels_is_refused():
    with pytest.raises(DataError, match="have 1 channels"):
        RandAugment(2, 9.0, 0.5, FILL).change(noise(1), 0)


# in the batches


@pytest.fixture(scope="module", params=["sample", "folder"])
def source(request, tmp_path_factory):
    """Gray tiles in memory; colour files of several sizes."""
    if request.param == "sample":
        return open_source("sample", "train")
    root = tmp_path_factory.mktemp("photos")
    for i in range(11):
        Image.fromarray(noise(3, 30 + i, 50 - i)).save(root / f"{i}.png")
    return open_source("folder", "train", path=str(root))


def batches(source, **options):
    return TrainBatches(source, **{**dict(batch_size=8, size=(24, 32), crop=RandomCrop(), seed=5), **options})


def randaug(source, layers=2):
    return RandAugment(layers, 9.0, 0.5, FILL[: source.channels])


def test_batches_are_augmented_after_the_crop_from_a_seed_of_their_own(source):
    augment = randaug(source)
    plain, augmented, changed = batches(source), batches(source, augment=augment), []
    for step in (0, 1, 2):
        a, b = plain.batch(step), augmented.batch(step)
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_array_equal(a["label"], b["label"])
        for place, (before, after, example) in enumerate(zip(a["image"], b["image"], a["id"])):
            epoch = np.int64((step * 8 + place) // source.num_examples)
            seed = pipeline._fold(5, pipeline.AUGMENT, epoch, example).numpy()
            np.testing.assert_array_equal(after, augment.change(before, seed.view(np.uint32)))
        changed.append((a["image"] != b["image"]).any((1, 2, 3)).mean())
    assert 0.3 < np.mean(changed) < 0.95


def test_augmented_batches_are_a_function_of_the_step_and_not_of_the_processes(source):
    augment = randaug(source)
    whole = batches(source, augment=augment)
    sequence = [whole.batch(step)["image"] for step in range(4)]
    jumper = batches(source, augment=augment)
    for step in (3, 1):
        np.testing.assert_array_equal(jumper.batch(step)["image"], sequence[step])
    parts = [batches(source, augment=augment, process=(p, 2)) for p in range(2)]
    for step in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part.batch(step)["image"] for part in parts]), sequence[step])
    assert (batches(source, augment=augment, seed=6).batch(0)["image"] != sequence[0]).any()


class Seeds(RandAugment):
    """Writes the first bytes of its seed where the image was."""

    def change(self, pixels, seed):
        return np.resize(np.frombuffer(seed.tobytes(), np.uint8), pixels.shape)


def test_every_example_of_every_epoch_has_its_own_seed(source):
    run, seen = batches(source, augment=Seeds(2, 9.0, 0.5, FILL[: source.channels])), {}
    for step in range(6):
        batch = run.batch(step)
        for place, (image, example) in enumerate(zip(batch["image"], batch["id"])):
            epoch = (step * 8 + place) // source.num_examples
            assert seen.setdefault((epoch, int(example)), image.tobytes()) == image.tobytes()
    assert len(set(seen.values())) == len(seen) == 48


# the sheet


def test_a_label_names_what_is_mixed():
    names = ("brick", "coffee", "flower", "gravel")
    smoothed = lambda *shares: np.array(shares) * 0.9 + 0.1 / 4
    assert label(smoothed(0, 1, 0, 0), names, 112) == "coffee  .93"
    assert label(smoothed(0, 0, 0.3, 0.7), names, 112) == "gravel  .66\nflower  .30"
    assert label(np.array([0.0, 1, 0, 0]), names, 112) == "coffee  1.00"
    assert label(np.array([0.0, 1, 0, 0]), (), 112) == "class 1  1.00"
    assert label(np.array([0.4, 0.6]), names, 112) == "coffee  .60\nbrick  .40"
    long = label(smoothed(1, 0, 0, 0), ("a name that takes more room than there is", *names[1:]), 112)
    assert long.startswith("a name") and long.endswith("…  .93") and len(long) < 30


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_the_sheet_shows_every_image(n, c):
    images = np.full((n, 16, 16, c), 0.5, np.float32)
    sheet = draw_augmented(images, np.eye(4)[np.arange(n) % 4], "abcd", columns=4)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    assert (sheet == 128).all(-1).sum() >= n * 112**2 > (sheet == 128).all(-1).sum() - 40
