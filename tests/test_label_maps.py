"""Images with label maps: folders, ADE20K's layout, what cannot be used, and what training makes of them."""

import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mim_jax.data import label_maps, scaled_crop, unreadable
from mim_jax.data.augment import DataError
from mim_jax.data.class_file import read_classes
from mim_jax.data.decoding import PLAIN
from mim_jax.data.pipeline import TrainBatches
from mim_jax.data.scaled_crop import COLOURS, DRAWS, ScaledCrop, distorted
from mim_jax.data.sources import open_source
from mim_jax.data.whole_images import fitted, whole_images

CLASSES = "name,red,green,blue\nsky,10,20,30\ntree,40,50,60\nignored,0,0,0\nroad,7,8,9\n"


def write(folder, name, array, mode=None):
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(place)


@pytest.fixture
def folder(tmp_path):
    """Four training pairs and one to validate, values 0 1 3 and 255."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.csv").write_text(CLASSES)
    for split, count in (("train", 4), ("val", 1)):
        for i in range(count):
            h, w = 20 + i, 30
            write(tmp_path, f"images/{split}/sub/{i}.png", rng.integers(0, 256, (h, w, 3), np.uint8))
            write(tmp_path, f"labels/{split}/sub/{i}.png", rng.choice(np.uint8([0, 1, 2, 3, 255]), (h, w)))
    return tmp_path


def opened(folder, split="train", **more):
    return open_source("label_maps", split, path=str(folder), **more)


def test_a_folder_of_pairs(folder):
    source = opened(folder)
    assert (source.num_examples, source.class_names) == (4, ("sky", "tree", "road"))
    assert source.colours == ((10, 20, 30), (40, 50, 60), (7, 8, 9))
    label_map = source.load(tf.constant(1, tf.int64))["label_map"].numpy()
    there = np.asarray(Image.open(folder / "labels/train/sub/1.png"))
    np.testing.assert_array_equal(label_map, np.uint8([0, 1, 255, 2] + 252 * [255])[there])
    (example,) = whole_images(opened(folder, "validation"), (1.0, 2.0), short=10, long=100)
    assert [view.shape for view in example["views"]] == [(10, 15, 3), (20, 30, 3)] and example["image"].shape == (20, 30, 3)
    (example,) = whole_images(opened(folder, "validation"), (0.5, 1.0, 2.0), short=0, long=0)
    assert [view.shape[:2] for view in example["views"]] == [(10, 15), (20, 30), (40, 60)]
    both = [e["id"] for k in (0, 1) for e in whole_images(source, (1.0,), 0, 0, process=(k, 2))]
    assert sorted(both) == [0, 1, 2, 3]


def test_values_may_be_colours(folder):
    for file in sorted((folder / "labels").rglob("*.png")):
        values = np.asarray(Image.open(file))
        values = np.where(values == 255, 2, values)
        table = np.uint8([(10, 20, 30), (40, 50, 60), (0, 0, 0), (7, 8, 9)])
        write(file.parent, file.name, table[values])
    found = opened(folder).load(tf.constant(0, tf.int64))["label_map"].numpy()
    assert set(np.unique(found)) == {0, 1, 2, 255}
    (folder / "classes.csv").write_text("name\nsky\ntree\nroad\n")
    with pytest.raises(DataError, match="it is in colours, and the file of the classes has none: write"):
        opened(folder)


def test_ade20k(tmp_path):
    rows = "".join(f"{i}\t.1\t1\t1\t0\tthing{i}, synonym\n" for i in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    write(tmp_path, "images/training/a.jpg", np.zeros((2, 3, 3), np.uint8))
    write(tmp_path, "annotations/training/a.png", np.uint8([[0, 1, 2], [150, 255, 7]]))
    source = opened(tmp_path)
    assert source.num_classes == 150 and source.class_names[149] == "thing150"
    np.testing.assert_array_equal(source.load(tf.constant(0, tf.int64))["label_map"], [[255, 0, 1], [149, 255, 6]])


def test_validation_may_be_held_out(folder):
    for kind in ("images", "labels"):
        (folder / kind / "val" / "sub" / "0.png").unlink()
        (folder / kind / "val" / "sub").rmdir()
        (folder / kind / "val").rmdir()
    counts = [opened(folder, split, holdout=50).num_examples for split in ("train", "validation")]
    assert sum(counts) == 4 and all(counts)


def spoil(folder, what):
    labels, images = folder / "labels/train/sub", folder / "images/train/sub"
    if what == "values":
        write(labels, "2.png", np.full((22, 30), 9, np.uint8))
    elif what == "size":
        write(labels, "2.png", np.zeros((22, 31), np.uint8))
    elif what == "map":
        (labels / "2.png").unlink()
    elif what == "image":
        (images / "2.png").unlink()
    elif what == "names":
        (folder / "classes.csv").unlink()
    elif what == "twice":
        (folder / "classes.csv").write_text("name\nsky\nsky\n")
    elif what == "latin":
        (folder / "classes.csv").write_bytes("name\nsky\nbüsche\nroad\nx\n".encode("latin-1"))
    elif what == "several":
        for name in ("1.png", "2.png"):
            (labels / name).write_bytes(b"no image")
    elif what == "stem":
        Image.open(images / "2.png").save(images / "2.jpg")
    elif what == "palette":
        for name in ("0.png", "1.png", "2.png", "3.png"):
            with_palette(labels / name, [(10, 20, 30), (7, 8, 9), (0, 0, 0), (7, 8, 9)])
    elif what == "folder":
        labels.parent.parent.rename(folder / "masks")


@pytest.mark.parametrize(
    "what,words",
    [
        ("values", r"2\.png: 660 pixels have values that no class has, such as 9; the 3 classes have 0 to 1, 3"),
        ("size", r"2\.png: the label map is 22x31, its image 22x30"),
        ("map", r"1 of 4 lack their pair: sub/2 \(no label map\)"),
        ("image", r"1 of 4 lack their pair: sub/2 \(no image\)"),
        ("names", r"has no file of the classes .*write .*classes\.csv, a line for each class"),
        ("twice", r"it names 2 classes, 1 of them different"),
        ("latin", r"classes\.csv: byte 10 is not UTF-8; save"),
        ("several", r"2 of 4 pairs of 'train' cannot be used; .*1\.png: cannot identify .*; they are .*1\.png, .*2\.png"),
        ("stem", r"sub/2\.(png|jpg) and images/train/sub/2\.(png|jpg) would have the same label map; rename"),
        ("palette", r"the value 1 is class 'tree' by its number and class 'road' by its colour in the palette, \(7, 8, 9\)"),
        ("folder", r"has no folders images/ and labels/ \(or annotations/\)"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(folder, what, words):
    spoil(folder, what)
    with pytest.raises(DataError) as error:
        opened(folder)
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def with_palette(file, colours):
    values = Image.fromarray(np.asarray(Image.open(file)), "P")
    values.putpalette(sum(colours, ()) + (0, 0, 0) * (256 - len(colours)))  # black, of another class, for 255 too
    values.save(file)


def test_a_palette_may_have_the_colours_of_the_classes_or_grays(folder):
    expected = opened(folder).load(tf.constant(1, tf.int64))["label_map"].numpy()
    for colours in ([(10, 20, 30), (40, 50, 60), (0, 0, 0), (7, 8, 9)], [(i, i, i) for i in range(256)]):
        with_palette(folder / "labels/train/sub/1.png", colours)
        np.testing.assert_array_equal(opened(folder).load(tf.constant(1, tf.int64))["label_map"], expected)


def test_evaluation_looks_at_every_pair_first(folder, monkeypatch):
    """Of training pairs some are looked at, and an image that cannot be read is left to data.bad_limit."""
    monkeypatch.setattr(label_maps, "CHECKED", 2)  # numbers 0 and 2
    (folder / "images/train/sub/1.png").write_bytes(b"no image")
    write(folder, "labels/train/sub/3.png", np.full((23, 30), 9, np.uint8))
    source = opened(folder)
    source.require_sound(2)
    with pytest.raises(DataError, match=r"2 of 4 pairs .*1\.png: the image cannot be read.*they are .*1\.png, .*3\.png"):
        source.require_sound()


def test_classes_that_no_label_map_has_are_named(folder, caplog):
    opened(folder)
    assert "no pixel" not in caplog.text
    for i in range(4):
        write(folder, f"labels/train/sub/{i}.png", np.where(np.arange(30) < 9, 0, 255)[None].repeat(20 + i, 0).astype(np.uint8))
    opened(folder)
    assert "no pixel of 4 label maps of 'train' is of tree, road (2 of 3 classes); some are 255" in caplog.text


def test_what_is_wrong_in_a_label_map_is_said_as_it_is(folder):
    source = opened(folder)
    write(folder, "labels/train/sub/0.png", np.full((20, 30), 9, np.uint8))
    (folder / "labels/train/sub/1.png").write_bytes(b"no image")
    (folder / "labels/train/sub/2.png").unlink()
    found = [unreadable.why(source, i, PLAIN) for i in range(3)]
    assert found[0] == ("600 pixels have values that no class has, such as 9; the 3 classes have 0 to 1, 3", False)
    assert found[1][0].startswith("the label map cannot be read: cannot identify") and not found[1][1]
    assert found[2][1] and "No such file" in found[2][0]
    with pytest.raises(DataError, match=r"0\.png: 600 pixels have values"):
        list(whole_images(source, (1.0,), 0, 0))


# -- training examples -------------------------------------------------------------------------------------------------


def drawn(**places) -> np.ndarray:
    draws = np.full(DRAWS, 0.99)
    for place, value in places.items():
        draws[getattr(scaled_crop, place)] = value
    return draws


def test_labels_follow_the_image_and_are_never_mixed():
    """A label for each value of the image, whatever is done to both."""
    labels = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4), 16, 0), 16, 1)
    crop = ScaledCrop(short=64, long=256, class_share=1.0, photometric=False)
    for seed in range(4):
        draws = np.random.default_rng(seed).random(DRAWS)
        image, found, shown = crop.see(labels[..., None] * 16, labels, draws, (32, 40))
        assert image.shape == (32, 40, 1) and set(np.unique(found)) <= {*range(16), 255}
        inside = np.zeros(found.shape, bool)
        inside[: shown[0], : shown[1]] = True
        assert (found[~inside] == 255).all() and (image[~inside] == 0).all() and (found[inside] < 16).all()
        assert (np.abs(image[inside][:, 0] / 16.0 - found[inside]) < 0.6).mean() > 0.85  # all but the borders of squares


def test_mirrors_and_sizes():
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    crop = ScaledCrop(short=0, long=0, scale=(1.0, 1.0), class_share=1.0, photometric=False)
    np.testing.assert_array_equal(crop.see(image[..., None], image, drawn(MIRROR=0.4), (2, 3))[1], image[:, ::-1])
    np.testing.assert_array_equal(crop.see(image[..., None], image, drawn(), (2, 3))[0][..., 0], image)
    assert fitted((400, 600), 512, 2048) == (512, 768) and fitted((100, 1000), 512, 2048) == (205, 2048)
    small = ScaledCrop(short=8, long=32, class_share=1.0, photometric=False)
    assert small.see(image[..., None], image, drawn(SCALE=0.0), (8, 8))[2].tolist() == [4, 6]
    assert fitted((20, 30), 0, 0, 1.5) == (30, 45) and fitted((20, 30), 10, 100, 2.0) == (20, 30)
    kept = ScaledCrop(short=0, long=0, class_share=1.0, photometric=False)
    assert kept.see(image[..., None], image, drawn(SCALE=0.5), (8, 8))[2].tolist() == [3, 4]  # times 1.25


def test_a_class_may_have_but_its_share_of_a_crop():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 48:] = 1
    crops = {share: ScaledCrop(64, 64, (1.0, 1.0), share, False, False) for share in (1.0, 0.75)}
    largest = {share: [] for share in crops}
    for seed in range(40):
        draws = np.random.default_rng(seed).random(DRAWS)
        for share, crop in crops.items():
            found = crop.see(labels[..., None], labels, draws, (16, 16))[1]
            largest[share].append(np.bincount(found.ravel()).max() / found.size)
    assert np.mean(np.array(largest[1.0]) < 0.75) < 0.35 < 0.75 < np.mean(np.array(largest[0.75]) < 0.75)


def test_colours_are_distorted_within_their_ranges():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    off = np.full(9, 0.9)
    np.testing.assert_array_equal(distorted(pixels, off), pixels)
    brighter = distorted(pixels, np.r_[0.1, 1.0, off[2:]])
    np.testing.assert_array_equal(brighter, np.minimum(pixels.astype(int) + 32, 255))
    stronger = distorted(pixels, np.r_[off[:2], 0.1, 1.0, off[4:]])
    np.testing.assert_array_equal(stronger, np.minimum(pixels * 1.5, 255).astype(np.uint8))
    gray = distorted(pixels, np.r_[off[:5], 0.1, 0.0, off[7:]])
    assert np.ptp(gray.astype(int), -1).mean() < 0.6 * np.ptp(pixels.astype(int), -1).mean()
    turned = distorted(pixels, np.r_[off[:7], 0.1, 1.0])
    np.testing.assert_allclose(turned.max(-1), pixels.max(-1), atol=2)
    assert (turned != pixels).mean() > 0.4 and len(off) == DRAWS - COLOURS


def test_batches_are_a_function_of_the_step(folder):
    source, crop = opened(folder), ScaledCrop(short=16, long=64)
    make = lambda: TrainBatches(source, batch_size=2, size=(16, 24), crop=crop, seed=3)
    one, other = make(), make()
    first = [one.batch(step) for step in range(3)]
    again = other.batch(2)
    assert first[2].keys() == {"image", "label", "label_map", "shown", "id"}
    assert all((first[2][key] == again[key]).all() for key in again) and first[0]["label_map"].shape == (2, 16, 24)
    one.close(), other.close()


def test_the_file_of_classes_may_say_its_values(tmp_path):
    (tmp_path / "classes.csv").write_text("id,name\n7,sky\n9,ignored\n33,road\n")
    classes = read_classes(str(tmp_path))
    np.testing.assert_array_equal(classes.numbered(Image.fromarray(np.uint8([[7, 9, 33, 255]]))), [[0, 255, 1, 255]])
    with pytest.raises(DataError, match="2 classes have 7, 33|2 classes have 7"):
        classes.numbered(Image.fromarray(np.uint8([[8]])))
