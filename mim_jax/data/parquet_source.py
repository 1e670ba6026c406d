"""Parquet files as the Hugging Face hub ships image sets: a column of encoded images, and one of labels."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
from absl import logging

from mim_jax.data import labels, shards
from mim_jax.data.augment import DataError
from mim_jax.data.packed_names import Numbered, narrow

CACHE = 256 * 2**20  # bytes of row groups kept; beside them at most those being read, one by each of four threads
LABELS = ("label", "labels", "class", "class_name", "target")
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


class Recent:
    """The results of `read(key)` used last, up to `limit` bytes, and the last one however large. For several threads."""

    def __init__(self, read, limit=CACHE):
        self._read, self._limit, self._lock = read, limit, threading.Lock()
        self._held, self._bytes = collections.OrderedDict(), 0  # key -> future of a result; bytes of those that are done

    def __call__(self, key):
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            if mine:
                future = self._held[key] = concurrent.futures.Future()
            self._held.move_to_end(key)
        if mine:
            try:
                future.set_result(self._read(key))
            except BaseException as error:  # whoever waits for it gets it too; the next call tries anew
                with self._lock:
                    del self._held[key]
                future.set_exception(error)
            else:
                self._drop_oldest(future.result().nbytes)
        return future.result()

    def _drop_oldest(self, more):
        with self._lock:
            self._bytes += more
            done = [key for key, future in self._held.items() if future.done()]
            for key in done[:-1]:
                if self._bytes <= self._limit:
                    break
                self._bytes -= self._held.pop(key).result().nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetSource(shards.ShardSource):
    """A row group is read whole, for any of its images; see CACHE for what is kept."""

    files: tuple[str, ...] = ()
    starts: Any = None  # int64 [groups]: the first example of each row group
    groups: Any = None  # [(place of its file, number in it)]
    recent: Recent = None
    folder: str = ""  # that all files are below

    def fetch(self, ids):
        groups = np.searchsorted(self.starts, ids, "right") - 1
        images = [b""] * len(ids)
        for group in np.unique(groups).tolist():
            try:
                held = self.recent(group)
            except (OSError, pa.ArrowException) as error:
                logging.warning("row group %d of %s cannot be read: %s", self.groups[group][1], self._file(group), error)
                continue
            for k in np.flatnonzero(groups == group).tolist():
                images[k] = held[int(ids[k] - self.starts[group])].as_py() or b""
        return images

    def _file(self, group):
        return self.files[self.groups[group][0]]

    def _place(self, example_id):
        """-> file, row in it."""
        group = int(np.searchsorted(self.starts, int(example_id), "right")) - 1
        first = next(k for k in range(group, -1, -1) if self.groups[k][1] == 0)
        return self._file(group), int(example_id) - int(self.starts[first])

    def describe(self, example_id):
        file, row = self._place(example_id)
        return f"row {row} of {file}"

    def file_name(self, example_id) -> str:
        file, row = self._place(example_id)
        return f"{os.path.relpath(file, self.folder)}/{row}"

    def listing(self):
        rows = np.diff(self.starts, append=self.num_examples)
        names = [os.fsencode(os.path.relpath(file, self.folder)) for file in self.files]
        first = [k for k, (_, number) in enumerate(self.groups) if number == 0]
        counts = np.add.reduceat(rows, first).tolist() if first else ()
        return Numbered([(names[self.groups[k][0]], range(count)) for k, count in zip(first, counts)])


def _opened(file, footer=None):
    return pq.ParquetFile(shards.stream(file) if "://" in file else file, metadata=footer)


def _footer(file):
    try:
        with _opened(file) as opened:
            return opened.metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is no whole Parquet file: {error}") from error


def _features(schema):
    """What the Hugging Face library says of the columns: {name: {"_type": ..., "names": ...}}."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _leaf(field):
    """The column of encoded images in a field: itself, or its part "bytes"; None where it has none."""
    if any(test(field.type) for test in BINARY):
        return field.name
    if pa.types.is_struct(field.type):
        inner = {part.name: part for part in field.type}
        return f"{field.name}.bytes" if "bytes" in inner and _leaf(inner["bytes"]) else None
    return None


def columns_of(schema, chosen, where):
    """Arrow schema, {"image": name, "label": name} as far as chosen ("label" may be "", none) -> leaf of images, label or "".

    Raises DataError for a column that is not there or is no such column, and where several might be meant.
    """
    there = {field.name: field for field in schema}
    listing = f"{where} has the columns " + ", ".join(f"{f.name} ({f.type})" for f in schema)
    leaves = {name: leaf for name, field in there.items() if (leaf := _leaf(field))}
    features = _features(schema)
    classes = [name for name in there if isinstance(features.get(name), dict) and features[name].get("_type") == "ClassLabel"]
    found = {}
    for role, fitting, usual in (("image", leaves, ("image",)), ("label", there, LABELS)):
        if role in chosen:
            candidates = [chosen[role]] if chosen[role] in fitting or not chosen[role] else []
        else:
            likely = [list(leaves)] if role == "image" else [classes, [name for name in LABELS if name in there]]
            exact = [name for name in usual[:1] if name in fitting]
            candidates = exact or next((names for names in likely if names), [] if role == "image" else [""])
        words = f"name the column with data.columns={role}=NAME" + (" (label= for none)" if role == "label" else "")
        if not candidates:
            what = f"no column {chosen[role]!r}" if role in chosen else "none"
            raise DataError(
                f"{listing}: {what} of encoded images; {words}." if role == "image" else f"{listing}: {what}; {words}."
            )
        if len(candidates) > 1:
            raise DataError(f"{listing}: {' and '.join(candidates)} may be the {role}; {words}.")
        found[role] = candidates[0]
    logging.info("%s: images in column %r, labels in %s", where, found["image"], found["label"] or "none")
    return leaves[found["image"]], found["label"]


def _labels(files, column):
    """-> as labels.found, of all rows of the files; one column is read."""

    def read(file):
        with _opened(file) as opened:
            return opened.read([column], use_threads=False).column(0)

    try:
        values = pa.chunked_array([chunk for part in shards.each(read, files) for chunk in part.chunks])
        if pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
            values = values.cast(pa.int64())  # raises where a number is not whole
        if pa.types.is_integer(values.type):
            return pc.fill_null(values.cast(pa.int64()), -1).to_numpy()
        return labels.found(values.to_pylist())
    except (pa.ArrowException, DataError, OSError) as error:
        raise DataError(f"column {column!r} of {files[0]}: {error}; data.columns=label= reads without labels.") from error


def open_parquet(path, split, channels, columns):
    """Raises DataError: no such file or split, a broken file, no column of images, or labels that are no classes."""
    root, splits = shards.by_split("parquet", path, (".parquet",))
    files = shards.of_split(splits, split, path)
    footers = shards.each(_footer, files)
    schema = footers[0].schema.to_arrow_schema()
    leaf, label = columns_of(schema, columns, files[0])
    for file, footer in zip(files, footers):
        if not {leaf.split(".")[0], label} <= {*footer.schema.to_arrow_schema().names, ""}:
            raise DataError(f"{file} has other columns than {files[0]}: {', '.join(footer.schema.to_arrow_schema().names)}.")
    groups = [(k, group) for k, footer in enumerate(footers) for group in range(footer.num_row_groups)]
    counts = [footers[k].row_group(group).num_rows for k, group in groups]
    if not sum(counts):
        raise DataError(f"The split {split!r} of {path!r} is empty.")
    numbers, names, missing = np.full(sum(counts), -1, np.int8), (), "no column of labels"
    if label:
        train = splits.get("train", files)
        given = _class_names(schema, label, train[0])
        numbers, names, missing = labels.numbered(
            _labels(files, label), lambda: _labels(train, label), given, f"{path}, {split}"
        )

    def read(group):
        k, number = groups[group]
        with _opened(files[k], footers[k]) as opened:
            column = opened.read_row_group(number, columns=[leaf], use_threads=False).column(0)
            return pc.struct_field(column, "bytes") if "." in leaf else column

    logging.info("%s, split %s: %d images in %d files, %d classes", path, split, sum(counts), len(files), len(names))
    held = dict(
        labels=tf.constant(narrow(np.asarray(numbers))), files=tuple(files), folder=root, groups=groups, recent=Recent(read)
    )
    held |= dict(starts=np.cumsum([0, *counts[:-1]], dtype=np.int64), missing=missing)
    return ParquetSource("parquet", split, sum(counts), names, channels, **held)


def _class_names(schema, label, train):
    """The names that the metadata give, the same in this split and in the first file of the training split; or ()."""
    own, first = (
        tuple(feature.get("names", ())) if isinstance(feature := _features(s).get(label), dict) else ()
        for s in (schema, _footer(train).schema.to_arrow_schema())
    )
    if own and first and own != first:
        strange = next(pair for pair in zip((*own, ""), (*first, "")) if pair[0] != pair[1])
        raise DataError(
            f"The classes of {train} are named otherwise than those of this split ({strange[1]!r}, {strange[0]!r})."
        )
    return own or first
