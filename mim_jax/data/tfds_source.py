"""TFDS datasets: array_record by random access, TFRecord as a seeded stream."""

import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.source import WAYS, NotPrepared, Source

SHUFFLE_BUFFER = 8192  # encoded records: about 1 GB for ImageNet
CYCLE = 16  # files read in turns while shuffling
LABEL_SETS = "real_label"  # of imagenet2012_real: the classes that annotators saw (arXiv 2006.07159), maybe none


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(Source):
    """Serialized records; `load` parses one and leaves the image encoded."""

    features: Any = None
    files: tuple = ()  # (filename, skip, take), in the order of the ids
    records: Any = None  # array_record only: ids -> list of bytes
    bulk = True

    def lookup(self, ids):
        fetch = lambda wanted: np.array(self.records.__getitems__(wanted.tolist()), object)
        return tf.ensure_shape(tf.numpy_function(fetch, [ids], tf.string, stateful=False), ids.shape)

    def load(self, item):
        example = self.features.deserialize_example(item, decoders={"image": tfds.decode.SkipDecoding()})
        if self.label_sets:
            present = tf.one_hot(example[LABEL_SETS], self.num_classes, on_value=True, off_value=False)
            label = tf.cast(tf.reduce_any(present, 0), tf.uint8)
        else:
            label = tf.cast(example["label"], tf.int32) if self.num_classes else tf.constant(-1)
        return {"image": example["image"], "label": label}

    def stream(self, low, high, seed=None):
        pieces = _cut(self.files, low, high)
        columns = [tf.constant(np.array(column)) for column in zip(*pieces)]
        if seed is not None:
            order = tf.random.experimental.stateless_shuffle(tf.range(len(pieces)), seed)
            columns = [tf.gather(column, order) for column in columns]

        def read(file, skip, take, first):
            records = tf.data.TFRecordDataset(file).skip(skip).take(take)
            return tf.data.Dataset.zip((tf.data.Dataset.range(first, first + take), records))

        ds = tf.data.Dataset.from_tensor_slices(tuple(columns))
        ds = ds.interleave(
            tf.autograph.experimental.do_not_convert(read),
            cycle_length=1 if seed is None else min(CYCLE, len(pieces)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        if seed is not None:
            buffer = tf.constant(min(SHUFFLE_BUFFER, high - low), tf.int64)
            ds = ds.shuffle(buffer, seed=tf.cast(seed[0], tf.int64), reshuffle_each_iteration=False)
        return ds


def _cut(files, low, high):
    """[(file, skip, take)] -> [(file, skip, take, id of the first record)] of the ids low .. high - 1."""
    pieces, start = [], 0
    for file, skip, take in files:
        first, last = max(low, start), min(high, start + take)
        if first < last:
            pieces.append((file, skip + first - start, last - first, first))
        start += take
    return pieces


def _open_builder(name, data_dir):
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"data.source={name!r} is neither 'sample' nor 'folder' nor a TFDS dataset; {WAYS}") from error
    except ValueError as error:  # TFDS says which variants there are
        raise DataError(f"data.source={name!r}: {error}") from error
    if not builder.info.splits:
        option = f"data.data_dir={data_dir!r}" if data_dir else "the default folder of TFDS (data.data_dir is empty)"
        manual = " --manual_dir=TARS" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise NotPrepared(
            f"{name} is not prepared in {option}: {os.fspath(builder.data_path)!r} does not hold it. Prepare it once with "
            f"tfds build {name} --data_dir={data_dir or 'DIR'}{manual} --file_format=array_record\nOr {WAYS}"
        )
    return builder


def open_tfds(name, split, *, data_dir, channels, label_sets=False):
    """Opens a prepared TFDS dataset with an `image` feature; nothing is ever downloaded.

    Raises:
      DataError: it is not there (NotPrepared), has no such split, no image, or lies in a format that is not read.
    """
    builder = _open_builder(name, data_dir)
    try:
        info = builder.info.splits[split]
        files = tuple((os.fspath(f.filename), f.skip, f.take) for f in info.file_instructions)
    except (KeyError, ValueError, AssertionError) as error:
        raise DataError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}, "
            "and slices of them such as 'train[:1%]' or 'train[10000:]'."
        ) from error
    if not info.num_examples:
        raise DataError(f"The split {split!r} of {name} is empty.")

    features = builder.info.features
    there = dict(features.items())
    if not isinstance(there.get("image"), tfds.features.Image):
        raise DataError(f"{name} has no feature 'image' that is an image; it has {', '.join(there)}.")
    label_sets = label_sets and LABEL_SETS in there
    label = there[LABEL_SETS].feature if label_sets else there.get("label")
    names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()

    file_format = builder.info.file_format.value
    if file_format not in ("array_record", "tfrecord"):
        raise DataError(f"{name} is stored as {file_format}; read are array_record and tfrecord.")
    random_access = file_format == "array_record"
    records = builder.as_data_source(split).data_source if random_access else None
    logging.info("%s, split %s: %d examples, %d classes, %s", name, split, info.num_examples, len(names), file_format)
    return TfdsSource(name, split, info.num_examples, names, channels, random_access, label_sets, features, files, records)
