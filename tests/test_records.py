"""Today's code continues what earlier code saved, and repeats what it computed: bit for bit where the machine is the same.

What is recorded, and how: tests/record_runs.py. Where the environment differs (another CPU, another XLA), the losses must
still agree to 1e-6, and the leaves of the state in root mean square and mean.
"""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance
from record_runs import RECORDS, RUNS, SAVED, STEPS, environment, outcome, renamed, start

# Where the environment differs: relative error of a loss or learning rate, of a gradient norm, of a leaf (in units of its root
# mean square); absolute error of what an evaluator finds, since one image more or less may be classified rightly. XLA with its
# optimisations on was off by 6e-7 (the first losses of the fine-tuning: 1.2e-6), 4e-7, 1.3e-6 and 6e-6 at most.
LOSS, NORM, LEAF, JUDGED = 1e-6, 1e-5, 1e-5, 0.02
# Of another environment in effect. BEiT's loss divides by the hidden tokens that count, a number known at run time since
# masks may hide fewer; XLA rounds its gradient otherwise in the last bit. LoMaR's errors are added up over windows in a row,
# no longer over the windows of each image. A sparse Swin's tokens attend within one sequence of an image, no longer in windows.
# On a CPU a linear layer is one product of two matrices, whose gradient adds up the tokens of all images in one row.
OTHERWISE = {"beit_windows", "lomar", "localmim_swin", "localmim_vit", "mae", "finetune"}


def resized_then(pixels, size, of=None, part=None, mirror=False, out=None):
    """What crops were resized by when the runs were recorded: TensorFlow's filter, off by one of 255 here and there."""
    if pixels.shape[:2] != tuple(size):
        pixels = tf.saturate_cast(tf.round(tf.image.resize(pixels, size, method="bicubic", antialias=True)), tf.uint8).numpy()
    pixels = pixels[:, :: -1 if mirror else 1]
    if out is not None:
        out[:] = pixels
    return pixels


def by_pil(change):
    """An operation of RandAugment as it was: by PIL, of a gray image."""

    def changed(pixels, share, sign, fill):
        image = Image.fromarray(pixels[..., 0])
        return np.asarray(change(image, share, sign, fill[0]))[..., None]

    return changed


def moved(matrix):
    kept = dict(method=Image.Transform.AFFINE, resample=Image.Resampling.BICUBIC)
    return lambda image, share, sign, fill: image.transform(
        image.size, data=matrix(image, sign * share), fillcolor=fill, **kept
    )


OPERATIONS_THEN = {
    "Rotate": lambda image, share, sign, fill: image.rotate(30 * sign * share, Image.Resampling.BICUBIC, fillcolor=fill),
    "Sharpness": lambda image, share, sign, fill: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + 0.9 * sign * share)),
    "ShearX": moved(lambda image, by: (1, 0.3 * by, 0, 0, 1, 0)),
    "ShearY": moved(lambda image, by: (1, 0, 0, 0.3 * by, 1, 0)),
    "TranslateX": moved(lambda image, by: (1, 0, 0.45 * by * image.width, 0, 1, 0)),
    "TranslateY": moved(lambda image, by: (1, 0, 0, 0, 1, 0.45 * by * image.height)),
}


@pytest.fixture
def recorded(tmp_path, monkeypatch, request):
    """The working directory holds the workdir as recorded, and LoMaR's where others start from -> (name, record.json)."""
    name = request.param
    monkeypatch.setattr("mim_jax.data.pil_bicubic.bicubic", resized_then)
    then = {operation: by_pil(change) for operation, change in OPERATIONS_THEN.items()}
    monkeypatch.setattr("mim_jax.data.randaugment.COMPILED", then)
    for folder in {"lomar", name}:
        shutil.copytree(RECORDS / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return name, json.loads((RECORDS / name / "record.json").read_text())


every_run = pytest.mark.parametrize("recorded", RUNS, indirect=True)


@every_run
def test_recorded_checkpoint_is_continued(recorded):
    name, record = recorded
    start(name)
    compare(name, record, first=SAVED)


@pytest.mark.parametrize("recorded", [name for name in RUNS if name != "streamed_probe"], indirect=True)
def test_recorded_run_is_repeated(recorded):
    name, record = recorded
    shutil.rmtree(name)
    start(name)
    compare(name, record, first=0)


def compare(name: str, record: dict, first: int):
    found, same = outcome(name), environment() == record["environment"] and name not in OTHERWISE
    close = lambda value, rel: value if same else pytest.approx(value, rel=rel, abs=1e-12)
    assert list(found["steps"]) == list(range(first + 1, STEPS + 1))  # a checkpoint that was not found would begin at 1
    for step, now in found["steps"].items():
        then = record["steps"][str(step)]
        assert now["loss"] == close(then["loss"], LOSS), step
        assert now["lr"] == close(then["lr"], LOSS), step
        assert now["grad_norm"] == close(then["grad_norm"], NORM), step
    judged = {renamed(key): value for key, value in record["evaluations"].items()}
    assert found["evaluations"] == (pytest.approx(judged, rel=LOSS) if same else pytest.approx(judged, abs=JUDGED))

    fingerprints, rms, mean = ({renamed(p): x for p, x in record[key].items()} for key in ("fingerprints", "rms", "mean"))
    assert set(found["fingerprints"]) == set(fingerprints) == set(found["rms"])
    if same:
        assert [path for path, bits in fingerprints.items() if found["fingerprints"][path] != bits] == []
    off = {path: max(abs(found["rms"][path] - rms[path]), abs(found["mean"][path] - mean[path])) for path in rms}
    assert {path: error for path, error in off.items() if error > LEAF * rms[path]} == {}
