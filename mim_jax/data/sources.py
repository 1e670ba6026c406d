"""Where examples come from: TFDS, an image folder or the embedded sample, behind one interface."""

import tensorflow as tf
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.image_folder import open_folder
from mim_jax.data.sample import photos
from mim_jax.data.source import ArraySource


def open_source(name, split, *, path="", data_dir="", channels=3, label_sets=False):
    """Opens a split. `name` is "sample", "folder" (with `path`) or a TFDS dataset (with `data_dir`).

    `split` is "train", "validation" or "test", and what the source adds: TFDS slices such as "train[:1%]", and "train_tiles"
    for the sample, which is always gray. A TFDS dataset with several labels per example (ReaL) has none unless `label_sets`.

    Raises:
      DataError: the data or the split does not exist, or the options do not fit together; NotPrepared, its kin, for a
        TFDS dataset that is not in `data_dir`.
    """
    if channels not in (1, 3):
        raise DataError(f"data.channels={channels}: images are decoded to 3 (colour) or 1 (gray) channels.")
    if path and name != "folder":
        words = f"is read with data.source=folder only, not with {name!r}; the folder of a TFDS dataset is data.data_dir."
        raise DataError(f"data.path={path!r} {words}")
    if name == "sample":
        return _open_sample(split)
    if name == "folder":
        return open_folder(path, split, channels)
    from mim_jax.data import tfds_source  # here, so that the other sources need no TFDS

    return tfds_source.open_tfds(name, split, data_dir=data_dir, channels=channels, label_sets=label_sets)


def _open_sample(split):
    images, labels, skipped = photos.load(split)
    logging.info("sample, split %s: %d images of %d px, %d flat ones skipped", split, len(images), images.shape[1], skipped)
    tensors = dict(images=tf.constant(images), labels=tf.constant(labels))
    return ArraySource("sample", split, len(images), photos.NAMES, channels=1, **tensors)
