"""A run that is continued on other data says what differs, and stops; or goes on where that is wanted."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from saved import REPO

from mim_jax.config import ConfigError, load
from mim_jax.data.image_folder import FolderSource
from mim_jax.data.packed_names import Packed
from mim_jax.data.source import ArraySource
from mim_jax.jobs.run import run
from mim_jax.runs import same_data, saved
from mim_jax.runs.same_data import OtherData


def folder(*names, classes=("cat", "dog")):
    paths = Packed.of(b"train/" + name.encode() for name in names)
    labels = tf.zeros([len(names)], tf.int32)
    return FolderSource("folder", "train", len(names), classes, 3, paths=paths, labels=labels, within=(b"train",))


def array(n=2, version=""):
    images = tf.zeros([n, 4, 4, 3], tf.uint8)
    return ArraySource("sample", "train", n, (), 3, version=version, images=images, labels=tf.fill([n], -1))


def meta(source, step=9):
    return {"step": step, "config": {"class_names": list(source.class_names)}, "data": same_data.record(source)}


OLD = folder("cat/0.png", "dog/0.png")


@pytest.mark.parametrize(
    "new,words",
    [
        (folder("cat/0.png", "dog/0.png", "dog/1.png"), "2 images -> 3; 1 new .dog/1.png."),
        (folder("cat/0.png"), "2 images -> 1; 1 gone .dog/0.png."),
        (folder("cat/0.png", "dog/1.png"), "1 new .dog/1.png., 1 gone .dog/0.png."),
        (
            folder("dog/0.png", "emu/0.png", classes=("dog", "emu")),
            "classes 2 there, 2 here; gone: cat; new: emu; 1 new .emu/0.png",
        ),
        (array(), "source 'folder' -> 'sample'"),
    ],
)
def test_what_differs_is_named(tmp_path, new, words):
    there = meta(OLD)
    same_data.keep_list(OLD, tmp_path)
    options = dict(labelled=False, workdir=tmp_path)
    with pytest.raises(OtherData, match=f"not that of step 9 of this run: {words}.*data.changed=continue"):
        same_data.require_same(there, new, go_on=False, **options)
    said = same_data.require_same(there, new, go_on=True, **options)
    assert "epochs and learning rate follow the new number" in said


def test_the_same_images_elsewhere_are_the_same(tmp_path):
    moved = FolderSource(
        "folder",
        "train",
        2,
        OLD.class_names,
        3,
        paths=Packed.of([b"T/cat/0.png", b"T/dog/0.png"]),
        labels=OLD.labels,
        folder=b"/elsewhere",
        within=(b"T",),
    )
    assert same_data.require_same(meta(OLD), moved, tmp_path, labelled=True, go_on=False) == ""


@pytest.mark.parametrize("list_there", ["none", "of other data", "half a file"])
def test_without_the_list_of_names(tmp_path, list_there):
    if list_there != "none":
        same_data.keep_list(folder("x.png"), tmp_path)
    if list_there == "half a file":
        (tmp_path / same_data.LIST).write_bytes((tmp_path / same_data.LIST).read_bytes()[:15])
    with pytest.raises(OtherData, match="run: other names of images"):
        same_data.require_same(meta(OLD), folder("cat/0.png", "dog/9.png"), tmp_path, labelled=False, go_on=False)
    same_data.keep_list(OLD, tmp_path)
    with pytest.raises(OtherData, match="1 new .dog/9.png"):
        same_data.require_same(meta(OLD), folder("cat/0.png", "dog/9.png"), tmp_path, labelled=False, go_on=False)


def test_another_version_of_a_data_set(tmp_path):
    with pytest.raises(OtherData, match="version 'set/1.0.0' -> 'set/2.0.0'"):
        same_data.require_same(
            meta(array(version="set/1.0.0")), array(version="set/2.0.0"), tmp_path, labelled=False, go_on=False
        )


@pytest.mark.parametrize("classes", [("dog", "zebra"), ("cat", "dog", "emu"), ("cat",)])
def test_labels_of_other_classes_are_never_continued(tmp_path, classes):
    for go_on in (False, True):
        with pytest.raises(OtherData, match="labels are counted in the order of the names"):
            same_data.require_same(meta(OLD), folder("a/0.png", classes=classes), tmp_path, labelled=True, go_on=go_on)


def test_checkpoints_from_before(tmp_path):
    there = meta(OLD)
    del there["data"]
    assert "not compared" in same_data.require_same(there, folder("cat/1.png"), tmp_path, labelled=True, go_on=False)
    with pytest.raises(OtherData):  # these know the names of their classes
        same_data.require_same(there, folder("a/1.png", classes=("a", "b")), tmp_path, labelled=True, go_on=False)
    assert same_data.require_same({"step": 1, "config": {}}, OLD, tmp_path, labelled=True, go_on=False)


def test_other_files_under_the_same_names(tmp_path):
    write(tmp_path, ["train/cat/0.png", "train/dog/0.png"])
    source = dataclasses.replace(OLD, folder=bytes(tmp_path))
    there = meta(source)
    assert same_data.require_same(there, source, tmp_path, labelled=True, go_on=False) == ""
    (tmp_path / "train/dog/0.png").write_bytes(b"longer or shorter")
    with pytest.raises(OtherData, match="run: files of other sizes under the same names"):
        same_data.require_same(there, source, tmp_path, labelled=True, go_on=False)


def settings(path, **changes):
    config = load(f"{REPO}/configs/mae_vitb.py:toy")
    config.log.tensorboard = config.evals.knn.on = config.evals.nmi.on = config.evals.reconstruct.on = False
    config.data.update(dict(source="folder", path=str(path), **changes))
    config.update(dict(total_steps=0, total_epochs=2, batch_size=4))
    return config


def write(path, names):
    from PIL import Image

    for k, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 9 * k, np.uint8)).save(path / name)


def test_a_run_on_a_folder_that_has_grown(tmp_path, capsys):
    data, work = tmp_path / "data", str(tmp_path / "run")
    write(data, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)])
    assert run(settings(data), work)["steps"] == 4
    run(settings(data), work)  # finished, and the same
    (data / "dog/0.png").unlink()
    write(data, [f"dog/new{i}.png" for i in range(5)])
    with pytest.raises(
        ConfigError, match="8 images -> 12; 5 new .dog/new0.png, dog/new1.png, dog/new2.png, ...., 1 gone .dog/0"
    ):
        run(settings(data), work)
    assert saved.open(work).step == 4  # nothing was touched
    results = run(settings(data, changed="continue"), work)
    assert results["steps"] == 6 and "continued at step 4; the data is not that of step 4" in capsys.readouterr().out
    assert saved.open(work).meta["data"]["examples"] == 12
    assert run(settings(data), work) == results  # these are its images now
    write(data, [f"dog/{i}.png" for i in range(1, 7)])
    for file in [*(data / "cat").iterdir(), *(data / "dog").glob("new*")]:
        file.unlink()
    (data / "cat").rmdir()
    with pytest.raises(ConfigError, match="beyond its end"):
        run(settings(data, changed="continue"), work)
