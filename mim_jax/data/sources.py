"""Where examples come from: files in one of several forms, TFDS or the embedded sample, behind one interface."""

import tensorflow as tf
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.coco_source import open_coco
from mim_jax.data.image_folder import open_folder
from mim_jax.data.label_maps import open_label_maps
from mim_jax.data.list_source import open_list
from mim_jax.data.sample import collage, photos, scenes
from mim_jax.data.source import ArraySource
from mim_jax.data.subset import sliced
from mim_jax.data.tar_source import open_tar


def open_parquet(*args):
    from mim_jax.data import parquet_source  # here, for pyarrow takes 40 MB

    return parquet_source.open_parquet(*args)


WITH_COLUMNS = {"parquet": open_parquet, "webdataset": open_tar, "list": open_list}
WITH_PATH = ("folder", *WITH_COLUMNS, "prepared", "coco", "label_maps")
BUCKETS = (
    "Of buckets gs:// is read, as parquet, webdataset or list; others are mounted (gcsfuse, mountpoint-s3) or copied to a "
    "disk first."
)
READING = {"columns": tuple(WITH_COLUMNS), "folders": ("folder",), "holdout": WITH_PATH}


def open_source(name, split, *, path="", data_dir="", channels=3, label_sets=False, objects=False, **reading):
    """Opens a split. `name` is "sample", "scenes", one of WITH_PATH (with `path`) or a TFDS dataset (with `data_dir`).

    `split` is "train", "validation" or "test", slices of them such as "train[:1%]", and what the source adds: "train_tiles"
    for the sample, which is always gray, as are its scenes and collages. A TFDS dataset with several labels per example (ReaL)
    has none unless `label_sets`; TFDS's coco is images alone unless its `objects` are asked for.
    `reading`: data.columns, data.folders and data.holdout, of those that READING says.

    Raises:
      DataError: the data or the split does not exist, or the options do not fit together; NotPrepared, its kin, for a
        TFDS dataset that is not in `data_dir`.
    """
    if channels not in (1, 3):
        raise DataError(f"data.channels={channels}: images are decoded to 3 (colour) or 1 (gray) channels.")
    if path and name not in WITH_PATH:
        words = f"is read with data.source={'|'.join(WITH_PATH)} only, not with {name!r}; the folder of a TFDS dataset is"
        raise DataError(f"data.path={path!r} {words} data.data_dir.")
    for key, value in reading.items():
        if value and name not in READING[key]:
            raise DataError(f"data.{key}={value!r} is for data.source={'|'.join(READING[key])}, not for {name!r}.")
    if name in WITH_COLUMNS:
        columns = _columns(reading.get("columns", ""))
        open_whole = lambda whole: WITH_COLUMNS[name](path, whole, channels, columns)
        try:
            return sliced(open_whole, split, reading.get("holdout", 0))
        except (tf.errors.OpError, NotImplementedError, ImportError) as error:  # what buckets raise
            if "://" not in path:
                raise
            raise DataError(f"data.path={path!r} cannot be read: {error}. {BUCKETS}") from error
    if name == "sample":
        return _open_sample(split)
    if name == "scenes":
        return scenes.open_scenes(split)
    if name == "coco":
        return open_coco(path, split, channels, reading.get("holdout", 0))
    if name == "folder":
        if "://" in path:
            raise DataError(f"data.path={path!r}: data.source=folder reads folders of this machine, not buckets. {BUCKETS}")
        return open_folder(path, split, channels, reading.get("folders", ""), reading.get("holdout", 0))
    if name == "label_maps":
        return open_label_maps(path, split, channels, reading.get("holdout", 0))
    if name == "collage":
        return collage.open_collage(split)
    from mim_jax.data import prepared_source, tfds_objects, tfds_source  # here, so that the other sources need no TFDS

    if name == "prepared":
        opened = lambda whole: prepared_source.open_prepared(path, whole, channels, label_sets)
        return sliced(opened, split, reading.get("holdout", 0))
    if objects and name.startswith("coco/"):
        return tfds_objects.open_objects(name, split, data_dir=data_dir, channels=channels)
    return tfds_source.open_tfds(name, split, data_dir=data_dir, channels=channels, label_sets=label_sets)


def _columns(text):
    """ "image=a,label=b" -> {"image": "a", "label": "b"}."""
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    columns = {role.strip(): name.strip() for role, _, name in pairs}
    if not columns.keys() <= {"image", "label"} or not all(equals for _, equals, _ in pairs) or columns.get("image") == "":
        raise DataError(f"data.columns={text!r}: write image=NAME,label=NAME, or one of the two; label= for none.")
    return columns


def _open_sample(split):
    images, labels, skipped = photos.load(split)
    logging.info("sample, split %s: %d images of %d px, %d flat ones skipped", split, len(images), images.shape[1], skipped)
    tensors = dict(images=tf.constant(images), labels=tf.constant(labels))
    return ArraySource("sample", split, len(images), photos.NAMES, channels=1, **tensors)
