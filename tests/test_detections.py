"""What judges and draws detections: planted ones on scenes, on one process and on two, as COCO's own tools see them."""

import gzip
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mim_jax import sharding
from mim_jax.assemble import datasets
from mim_jax.config import ConfigError
from mim_jax.data import masks, scale_jitter
from mim_jax.data.decoding import PLAIN
from mim_jax.data.object_source import packed
from mim_jax.data.sources import open_source
from mim_jax.evaluators import coco_ap, object_results
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.figures.detections import Objects, best, colour, draw_batch, draw_detections, overlay
from mim_jax.sections import read
from mim_jax.targets.pixels import Normaliser

GOLDEN = pathlib.Path(__file__).parent / "golden"
SIZE, MOST, CELLS = (96, 160), 6, 28


def table(source, shift=0.0):
    """What a perfect detector would say of every scene: boxes in the padded image, moved by `shift` pixels, and the masks."""
    n = source.num_examples
    found = dict(boxes=np.zeros((n, MOST, 4), np.float32), scores=np.zeros((n, MOST), np.float32))
    found |= dict(classes=np.zeros((n, MOST), np.int32), found=np.zeros((n, MOST), bool))
    found["mask_logits"] = np.full((n, MOST, CELLS, CELLS), -9, np.float32)
    for i in range(n):
        sides = source.sides[i].tolist()
        ratio = scale_jitter.fitted_sides(sides, SIZE)[0] / sides[0]
        for j, o in enumerate(source.objects_of(i)):
            x, y, w, h = o["bbox"]
            found["boxes"][i, j] = np.array([x, y, x + w, y + h]) * ratio + shift
            found["scores"][i, j], found["classes"][i, j], found["found"][i, j] = 0.9 - 0.1 * j, o["category_id"] - 1, True
            bits = masks.bitmap(o["segmentation"], *sides)[y : y + h, x : x + w]
            rows, columns = ((np.arange(CELLS) * 2 + 1) * side // (2 * CELLS) for side in bits.shape)
            found["mask_logits"][i, j] = np.where(bits[rows][:, columns], 9, -9)
    return found


class Planted(nn.Module):
    """Answers from a table, by what the image is: the sum of its pixels finds the place."""

    def detect(self, images, size):
        given = self.variables["params"]
        at = jnp.argmin(jnp.abs(images.sum((1, 2, 3))[:, None] - given["sums"]), axis=1)
        assert size.shape == (len(images), 2)
        return {key: given[key][at] for key in ("boxes", "scores", "classes", "found", "mask_logits")}


def judged(source, shift=0.0, folder=None, pictures=3):
    data = read(datasets.DetectionData, detection_data(), "data.")
    batches, count = datasets.split_batches(source, SIZE, data, 16)
    normalise = Normaliser(mean=(-0.1,), std=(1.0,))
    sums = [np.asarray(normalise(b["image"], b["size"]).sum((1, 2, 3)))[b["valid"]] for b in batches()]
    variables = {"params": table(source, shift) | {"sums": np.concatenate(sums)}}
    runner = SplitRunner(object_results.finder(Planted(), normalise), sharding.make_mesh(), batches, count)
    draw = object_results.drawer(source, PLAIN, pictures)
    return object_results.judge(
        runner, source, "test", draw, folder, type("State", (), {"variables": lambda self: variables})()
    )


def detection_data(**changes):
    place = dict(source="scenes", path="", data_dir="", columns="", folders="", holdout=0)
    seen = dict(exif="auto", bad_limit=0.1, normalise="dataset", mean=(0.5,), std=(0.25,))
    jitter = dict(scale=(0.1, 2.0), flip=0.5, per_axis=False, objects=100)
    return place | seen | dict(changed="refuse", train_split="train") | jitter | changes


@pytest.fixture(scope="module")
def scenes():
    return open_source("scenes", "validation", channels=1).take(np.arange(40))


def test_planted_detections_are_all_right_and_a_pixel_is_noticed(scenes, tmp_path):
    scalars, pictures = judged(scenes, folder=tmp_path)
    assert scalars["test/box/AP"] == pytest.approx(1.0) and scalars["test/mask/AP"] > 0.9
    assert scalars["test/detections"] == sum(len(scenes.objects_of(i)) for i in range(40))
    assert len([name for name in scalars if name.startswith("test/mask/")]) == 12
    figure = pictures["detections/pictures"]
    assert figure.dtype == np.uint8 and figure.shape[1] > 4 * 384
    results = json.loads((tmp_path / "detections_test.json").read_text())
    assert coco_ap.scores(scenes.ground_truth(), results)["box/AP"] == scalars["test/box/AP"]
    moved, _ = judged(scenes, shift=2.0, pictures=0)
    assert 0.3 < moved["test/box/AP"] < 0.9 and moved["test/mask/AP"] < scalars["test/mask/AP"] - 0.05


def recorded():
    read = lambda name: json.loads(gzip.decompress((GOLDEN / f"coco_ap_tiny_{name}.json.gz").read_bytes()))
    return read("annotations"), read("results")


def test_nothing_found_is_nothing_right():
    truth, _ = recorded()
    scores = coco_ap.scores(truth, [])
    assert scores["box/AP"] == scores["mask/AR_100"] == 0
    assert coco_ap.scores(truth | {"annotations": []}, [])["mask/AP"] == -1


def test_images_without_objects_are_refused_before_they_are_judged(scenes):
    object_results.require_truth(scenes, 0)
    bare = scenes.take(np.arange(4))
    bare.objects[1:] = [packed([])] * 3
    object_results.require_truth(bare, 1)
    with pytest.raises(ConfigError, match="none of the 3 images to be judged has an annotation"):
        object_results.require_truth(bare.take(np.array([1, 2, 3])), 0)


PART = """
import json, sys, jax
sys.path.insert(0, {tests!r})
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from test_detections import recorded
from mim_jax.evaluators import coco_ap
truth, results = recorded()
mine = [each for each in results if each["image_id"] % 2 == jax.process_index()]
found = coco_ap.gathered(mine)
assert jax.process_count() == 2 and 0 < len(mine) < len(found)
print(json.dumps([list(map(float, coco_ap.evaluated(truth, found, kind).stats)) for kind in coco_ap.KINDS]))
"""


def test_two_processes_gather_to_the_last_digit():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = PART.format(port=free.getsockname()[1], tests=str(GOLDEN.parent))
    start = lambda p: subprocess.Popen(
        [sys.executable, "-c", code, str(p)], stdout=subprocess.PIPE, text=True, cwd=GOLDEN.parent.parent
    )
    processes = [start(p) for p in (0, 1)]
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    truth, results = recorded()
    whole = [coco_ap.evaluated(truth, results, kind).stats.tolist() for kind in coco_ap.KINDS]
    with np.load(GOLDEN / "coco_ap_tiny.npz") as case:
        assert whole == [case[f"out/{kind}/stats"].tolist() for kind in coco_ap.KINDS]
    for text in outputs:
        assert json.loads(text.splitlines()[-1]) == whole


def test_pictures_show_masks_in_their_colours_and_weak_ones_not():
    bits = np.zeros((2, 20, 30), bool)
    bits[0, 5:10, 5:15] = bits[1, 12:18, 20:28] = True
    found = Objects(np.array([[5, 5, 15, 10], [20, 12, 28, 18.0]]), np.array([0, 1]), bits, np.array([0.2, 0.8]))
    assert best(found).classes.tolist() == [1]
    image = np.full((20, 30, 1), 100, np.uint8)
    picture = overlay(image, found._replace(scores=None), ("cat", "cup"), side=300)
    assert picture.shape == (200, 300, 3)
    for k, (y, x) in enumerate([(80, 100), (160, 250)]):
        assert np.abs(picture[y, x] - (0.55 * 100 + 0.45 * np.array(colour(k)))).max() < 2
    assert (picture[20, 20] == 100).all() and len({colour(k) for k in range(80)}) == 80
    batch = dict(image=image[None], boxes=found.boxes[None], classes=found.classes[None], valid=np.array([[True, False]]))
    assert (draw_batch(batch | {"instance_masks": np.packbits(bits, axis=-1)[None]}, ("cat", "cup")) == colour(0)).all(-1).any()
    figure = draw_detections([(image, None, found)] * 3, ("cat", "cup"), "own images")
    assert figure.ndim == 3


def test_what_is_not_drawn_is_not_pasted(scenes):
    found = {key: x[:1] for key, x in table(scenes).items()}
    found |= dict(size=np.array([[96, 96]]), original_size=scenes.sides[:1])
    found["scores"][0, 0] = 0.1
    whole, seen = object_results.on_the_original(found, 0), []
    drawn = object_results.on_the_original(found, 0, lambda objects: seen.append(objects) or best(objects))
    assert seen[0].masks.shape[1:] == (CELLS, CELLS) and 0 < len(drawn.scores) == len(whole.scores) - 1
    for ours, theirs in zip(drawn, best(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_data_without_boxes_is_refused():
    data = read(datasets.DetectionData, detection_data(source="sample"), "data.")
    with pytest.raises(ConfigError, match="data.source=sample has no boxes"):
        data.opened("test", 1)


def test_more_objects_than_are_learned_from_are_counted(scenes, caplog):
    data = read(datasets.DetectionData, detection_data(objects=2), "data.")
    crop = data.seen(scenes)["crop"]
    assert crop.objects == 2 and crop.class_of[1] == 0
    more = sum(len(scenes.objects_of(i)) > 2 for i in range(40))
    assert f"{more} of 40 images have more than data.objects=2 (up to 5)" in caplog.text and jax.process_count() == 1
