"""Sliding windows, confusion matrices and mIoU: recorded tensors, plain counts, odd sizes, several processes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_devices

from mim_jax import sharding
from mim_jax.config import ConfigError
from mim_jax.evaluators import confusion, sliding
from mim_jax.evaluators.mean_iou import Judge, Look, padded, summed
from mim_jax.models.bilinear import pooled, resized

CLASSES = 4


def test_recorded_windows_are_merged_resized_and_decided(golden):
    case = golden("slide_tiny")
    windows = np.stack([np.moveaxis(case[f"input/window_logits_{i}"][0], 0, -1) for i in range(12)])
    windows = windows.reshape(3, 4, 24, 24, CLASSES)
    assert (sliding.starts(50, 24, 16), sliding.starts(70, 24, 16)) == ([0, 16, 26], [0, 16, 32, 46])
    place = lambda h, w: (sliding.placing(50, 24, 16, 24, h), sliding.placing(70, 24, 16, 24, w))
    for key, size in (("merged", (50, 70)), ("resized", (65, 91))):
        ours = np.moveaxis(np.asarray(sliding.merged(jnp.asarray(windows), *place(*size))), -1, 0)
        np.testing.assert_allclose(ours, case[f"out/{key}_logits"][0], atol=1e-4 * np.abs(ours).max())
    rows, columns = place(65, 91)
    found = jax.jit(sliding.predicted)([(windows, sliding.extended(rows, sliding.STRIP), columns)])
    np.testing.assert_array_equal(found[:65], case["out/prediction"][0])


def test_recorded_scores(golden):
    case = golden("miou_tiny")
    matrix = 0
    for i in range(3):
        labels, found = case[f"derived/label_{i}"], case[f"input/prediction_{i}"]
        one = confusion.counted(labels, found, 9)
        for key, ours in (("intersect", np.diag(one)), ("pred", one.sum(0)), ("label", one.sum(1))):
            np.testing.assert_array_equal(ours, case[f"out/area_{key}_{i}"])
        brute = np.zeros((9, 9), int)
        for label, prediction in zip(labels.ravel(), found.ravel()):
            if label != 255:
                brute[label, prediction] += 1
        np.testing.assert_array_equal(one, brute)
        matrix = matrix + one
    scores = confusion.scores(matrix)
    for key, name in (
        ("aAcc", "pixel_accuracy"),
        ("mIoU", "miou"),
        ("mAcc", "mean_accuracy"),
        ("IoU", "iou"),
        ("Acc", "accuracy"),
    ):
        np.testing.assert_allclose(scores[name], case[f"out/{key}"], rtol=1e-6)
    assert np.isnan(scores["iou"][5])


@pytest.mark.parametrize("old,new", [((5, 7), (12, 9)), ((9, 4), (3, 4)), ((1, 1), (2, 3))])
def test_maps_are_resized_as_torch_does(old, new):
    maps = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    expected = jax.image.resize(maps, (2, *new, 3), "linear", antialias=False)
    np.testing.assert_allclose(resized(jnp.asarray(maps), new), expected, atol=1e-6)


def test_pooled_parts_may_overlap():
    maps = np.random.default_rng(0).normal(size=(1, 3, 5, 2)).astype(np.float32)
    ours = pooled(jnp.asarray(maps), 2)
    np.testing.assert_allclose(ours[0, 1, 0], maps[0, 1:3, 0:3].mean((0, 1)), atol=1e-6)
    assert pooled(jnp.asarray(maps), 6).shape == (1, 6, 6, 2)


# -- the judge, on a net whose logits are half the size of its images --------------------------------------------------


@jax.jit
def net(variables, batch):
    pixels = batch["image"][:, ::2, ::2].astype(jnp.float32) * variables["scale"]
    return jnp.stack([jnp.sin(pixels[..., 0] * (k + 1)) for k in range(CLASSES)], -1)


class State:
    def variables(self):
        return {"scale": jnp.float32(0.05)}


def examples(count=5):
    rng = np.random.default_rng(1)
    for i, (h, w) in enumerate([(37, 51), (16, 16), (20, 33), (51, 37), (18, 64)][:count]):
        image = rng.integers(0, 256, (h, w, 1), np.uint8)
        labels = rng.integers(0, CLASSES, (h, w)).astype(np.uint8)
        labels[rng.random((h, w)) < 0.1] = 255
        yield {"image": image, "label_map": labels, "id": i, "views": [image]}


def judge(images, num_examples, look, shown=0):
    names = tuple("abcd")
    return Judge(net, images, num_examples, look, 3, "test", names, (), shown)


def slow(image, look):
    """Window by window, added up and divided."""
    window, (h, w) = look.window, image.shape[:2]
    high, wide = max(h, window), max(w, window)
    total, count = np.zeros((high, wide, CLASSES)), np.zeros((high, wide, 1))
    for y in sliding.starts(h, window, look.stride):
        for x in sliding.starts(w, window, look.stride):
            piece, _ = padded(image[y : y + window, x : x + window], window)
            logits = net(State().variables(), {"image": piece[None]})
            total[y : y + window, x : x + window] += jax.image.resize(logits, (1, window, window, CLASSES), "linear")[0]
            count[y : y + window, x : x + window] += 1
    return (total / count)[:h, :w]


def test_every_pixel_of_odd_images_is_judged_once():
    look, matrix = Look(16, 10), np.zeros((CLASSES, CLASSES), int)
    for example in examples():
        labels, found = example["label_map"], slow(example["image"], look).argmax(-1)
        for label in range(CLASSES):
            for prediction in range(CLASSES):
                matrix[label, prediction] += ((labels == label) & (found == prediction)).sum()
    scores, pictures = judge(examples, 5, look, shown=2)(State())
    expected = confusion.scores(matrix)
    assert scores["test/miou"] == pytest.approx(expected["miou"], abs=1e-12)
    assert scores["test/pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum(), abs=1e-12)
    assert scores["test/iou/c"] == pytest.approx(expected["iou"][2], abs=1e-12) and scores["test/images"] == 5
    assert pictures["test/predictions"].dtype == np.uint8


def test_whole_images_and_mirrored_ones():
    found = dict((e["id"], x) for e, x in judge(examples, 5, Look(0, 0)).predictions(State().variables()))
    for example in examples():
        logits = net(State().variables(), {"image": example["image"][None]})
        expected = resized(logits, example["image"].shape[:2])[0].argmax(-1)
        assert (found[example["id"]] == np.asarray(expected)).mean() > 0.999  # ties aside
    images = lambda: ({**e, "views": [np.concatenate([e["image"], e["image"][:, ::-1]], 1)]} for e in examples(1))
    ((example, flipped),) = judge(images, 1, Look(0, 0, flip=True)).predictions(State().variables())
    assert (flipped == flipped[:, ::-1]).mean() > 0.999  # of an image that is its own mirror image


def test_two_processes_judge_a_split_together():
    """Each its share of the images, on two devices; both get the scores of the whole, and counts above what devices add."""
    script, environments = os.path.abspath(__file__), test_devices.meeting()
    start = lambda env: subprocess.Popen(
        [sys.executable, script],
        cwd=test_devices.REPO,
        env={**os.environ, **env, "XLA_FLAGS": test_devices.xla_flags(2), "PYTHONPATH": str(test_devices.REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    alone, _ = judge(examples, 5, Look(16, 10))(State())
    for process in [start(env) for env in environments]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-3000:]
        scores, counts = json.loads(out.splitlines()[-1])
        assert scores == pytest.approx(alone, abs=1e-12) and counts == [[2**40, 3], [2, 2**33 + 1]]


def shared():
    """One of the two processes."""
    sharding.start_processes()
    place = jax.process_index()
    images = lambda: (example for example in examples() if example["id"] % 2 == place)
    scores, _ = judge(images, 5, Look(16, 10))(State())
    counts = np.array([[[2**40, 1], [2, 2**33]], [[0, 2], [0, 1]]])[place]
    print(json.dumps([scores, summed(counts).tolist()]))


def test_a_split_is_seen_exactly():
    with pytest.raises(RuntimeError, match="saw 4 examples of a split of 5"):
        judge(lambda: examples(4), 5, Look(16, 10))(State())
    nothing = lambda: ({**e, "label_map": np.full_like(e["label_map"], 255)} for e in examples(1))
    with pytest.raises(ConfigError, match="no pixel"):
        judge(nothing, 1, Look(16, 10))(State())


if __name__ == "__main__":
    shared()
