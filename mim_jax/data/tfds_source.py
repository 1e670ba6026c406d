"""TFDS datasets: array_record by random access, TFRecord as a seeded stream."""

import dataclasses
import functools
import os
import re
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.records import Records, RecordSource
from mim_jax.data.source import WAYS, NotPrepared

SHUFFLE_BUFFER = 8192  # encoded records: about 1 GB for ImageNet
COUNTED = 200_000  # examples that are read through at most, to count integer labels
VERSION = "dataset_info.json"  # lies in the folder of each version
CYCLE = 16  # files read in turns while shuffling
LABEL_SETS = "real_label"  # of imagenet2012_real: the classes that annotators saw (arXiv 2006.07159), maybe none


def as_set(classes, count):
    """int64 [any] -> uint8 [count], 1 for every class among them."""
    return tf.cast(tf.reduce_any(tf.one_hot(classes, count, on_value=True, off_value=False), 0), tf.uint8)


def _without_image():
    value = tf.train.Feature
    image, label = value(bytes_list=tf.train.BytesList(value=[b""])), value(int64_list=tf.train.Int64List(value=[-1]))
    return tf.train.Example(features=tf.train.Features(feature={"image": image, "label": label})).SerializeToString()


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(RecordSource):
    """Serialized records; `load` parses one and leaves the image encoded."""

    features: Any = None  # those that are read
    files: tuple = ()  # (filename, skip, take), in the order of the ids
    broken = _without_image()

    def load(self, item):
        example = self.features.deserialize_example(item, decoders={"image": tfds.decode.SkipDecoding()})
        if self.label_sets:
            label = as_set(example[LABEL_SETS], self.num_classes)
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
        if data_dir and tf.io.gfile.exists(os.path.join(data_dir, VERSION)):  # the folder of one version itself
            builder = tfds.builder_from_directory(data_dir)
            if builder.name != re.split("[/:]", name)[0]:
                raise DataError(f"data.data_dir={data_dir!r} holds {builder.info.full_name}, not data.source={name!r}.")
        else:
            builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"data.source={name!r} is neither 'sample' nor 'folder' nor a TFDS dataset; {WAYS}") from error
    except (ValueError, AssertionError, ImportError) as error:  # TFDS says which variants there are, or what it lacks
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.source={name!r} cannot be opened by TFDS: {error}") from error
    if not builder.info.splits:
        option = f"data.data_dir={data_dir!r}" if data_dir else "the default folder of TFDS (data.data_dir is empty)"
        manual = " --manual_dir=TARS" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise NotPrepared(
            f"{name} is not prepared in {option}: {os.fspath(builder.data_path)!r} does not hold it. Prepare it once with "
            f"tfds build {name} --data_dir={data_dir or 'DIR'}{manual} --file_format=array_record\nOr {WAYS}"
        )
    return builder


@functools.lru_cache(maxsize=8)
def _integer_classes(folder):
    """Folder of a version whose `label` has no names -> (names "0", "1", ... over all splits; why there are none)."""
    builder = tfds.builder_from_directory(folder)
    label = builder.info.features["label"]
    what = "its feature 'label' is no ClassLabel and no whole number"
    if label.shape != () or not tf.as_dtype(label.dtype).is_integer:
        return (), what
    total = sum(info.num_examples for info in builder.info.splits.values())
    if total > COUNTED:
        return (), f"its feature 'label' has no names, and more than {COUNTED} examples are not read through to count them"
    low, high = 0, -1
    for info in builder.info.splits.values():
        if builder.info.file_format.value == "array_record":
            records, n = Records(info.file_instructions), info.num_examples
            batches = (list(filter(None, records.fetch(np.arange(i, min(i + 1024, n))))) for i in range(0, n, 1024))
        else:
            batches = tf.data.TFRecordDataset(list(map(os.fspath, info.filepaths))).batch(1024)
        for records in batches:
            labels = tf.io.parse_example(records, {"label": tf.io.FixedLenFeature([], tf.int64)})["label"].numpy()
            low, high = min(low, int(labels.min())), max(high, int(labels.max()))
    if low < 0 or high >= COUNTED:
        return (), f"its feature 'label' goes from {low} to {high}, which are no numbers of classes"
    return tuple(map(str, range(high + 1))), ""


def opened_split(name, split, data_dir):
    """-> builder, what TFDS says of the split, and its pieces of files.

    Raises DataError: it is not there (NotPrepared), has no such split, or an empty one.
    """
    builder = _open_builder(name, data_dir)
    try:
        info = builder.info.splits[split]
        pieces = info.file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise DataError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}, "
            "and slices of them such as 'train[:1%]' or 'train[10000:]'."
        ) from error
    if not info.num_examples:
        raise DataError(f"The split {split!r} of {name} is empty.")
    return builder, info, pieces


def open_tfds(name, split, *, data_dir, channels, label_sets=False):
    """Opens a prepared TFDS dataset with an `image` feature; nothing is ever downloaded.

    Raises:
      DataError: it is not there (NotPrepared), has no such split, no image, or lies in a format that is not read.
    """
    builder, info, pieces = opened_split(name, split, data_dir)
    files = tuple((os.fspath(f.filename), f.skip, f.take) for f in pieces)
    there = dict(builder.info.features.items())
    if not isinstance(there.get("image"), tfds.features.Image):
        raise DataError(f"{name} has no feature 'image' that is an image; it has {', '.join(there)}.")
    label_sets = label_sets and LABEL_SETS in there
    label = there[LABEL_SETS if label_sets else "label"] if label_sets or "label" in there else None
    kind = label.feature if label_sets else label
    names, missing = tuple(kind.names) if isinstance(kind, tfds.features.ClassLabel) else (), ""
    if not names and label is not None and not label_sets:
        names, missing = _integer_classes(os.fspath(builder.data_path))

    file_format = builder.info.file_format.value
    if file_format not in ("array_record", "tfrecord"):
        raise DataError(f"{name} is stored as {file_format}; read are array_record and tfrecord.")
    random_access = file_format == "array_record"
    records = Records(pieces) if random_access else None
    read = {"image": there["image"], **({LABEL_SETS if label_sets else "label": label} if names else {})}
    logging.info("%s, split %s: %d examples, %d classes, %s", name, split, info.num_examples, len(names), file_format)
    return TfdsSource(
        name, split, info.num_examples, names, channels, random_access, label_sets, missing, str(builder.info.full_name),
        features=tfds.features.FeaturesDict(read), files=files, records=records,
    )  # fmt: skip
