"""Lists of image files and their labels: .csv, .tsv or .jsonl."""

import collections
import dataclasses
import functools
import itertools
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import labels, shards
from mim_jax.data.augment import DataError
from mim_jax.data.list_index import Rows, rows_of
from mim_jax.data.listing import shown
from mim_jax.data.packed_names import Changed, Packed, narrow
from mim_jax.data.source import Source, evenly

ENDINGS = (".csv", ".tsv", ".jsonl")


@dataclasses.dataclass(frozen=True, eq=False)
class ListSource(Source):
    """Image files, read when they are needed."""

    paths: Packed = None  # in full
    labels: tf.Tensor = None  # whole numbers [n]
    folder: str = ""  # that the list lies in

    def load(self, item):
        return {"image": tf.io.read_file(self.paths.lookup(item)), "label": tf.cast(self.labels[item], tf.int32)}

    def describe(self, example_id):
        return shown(self.paths[int(example_id)])

    def file_name(self, example_id) -> str:
        return shown(_below(self.paths[int(example_id)], os.fsencode(self.folder)))

    def listing(self):
        folder = os.fsencode(self.folder)
        return Changed(self.paths, lambda path: _below(path, folder))

    def sizes(self, count):
        paths = self.paths.take(evenly(self.num_examples, count))
        return [os.stat(path).st_size if os.path.exists(path) else -1 for path in paths]


@functools.lru_cache(maxsize=2**16)
def _relative(place, folder):
    return os.path.relpath(place, folder)


def _below(path, folder):
    """A path, relative to a folder; os.path.relpath, once for every folder."""
    place, _, name = path.rpartition(b"/")
    if b"://" in path:
        return path.removeprefix(folder + b"/")
    if not place or name in (b"", b".", b".."):
        return os.path.relpath(path, folder)
    inside = _relative(place, folder)
    return name if inside == b"." else inside + b"/" + name


class Part(NamedTuple):
    """The lines of a list that are of one split."""

    folder: bytes  # of the list
    rows: Rows
    places: np.ndarray  # int64

    def paths(self):
        """In full."""
        start = os.path.join(self.folder, b"")
        for path in self.rows.paths.take(self.places):
            yield path if path.startswith(b"/") or b"://" in path else start + path


def _by_split(path, columns):
    """data.path -> the folder of the lists, {split: parts}; a column `split` comes before the name of a list.

    Raises DataError for lists without a line.
    """
    splits = collections.defaultdict(list)
    root, lists = shards.by_split("list", path, ENDINGS)
    for named, files in lists.items():
        for file in files:
            rows = rows_of(file, columns)
            for k, split in enumerate(rows.splits):
                part = Part(os.fsencode(os.path.dirname(file)), rows, np.flatnonzero(rows.split == k))
                splits[split or named].append(part)
    if not splits:
        raise DataError(f"data.path={path!r} lists no image.")
    return root, dict(splits)


def missing_files(paths) -> list[str]:
    """Those that are not there, as shown. A bucket is not asked."""
    folders = collections.defaultdict(list)
    for path in paths:
        if b"://" not in path:
            folder, slash, name = path.rpartition(b"/")
            folders[folder or slash].append(name)
    missing = []
    for folder, wanted in folders.items():
        there = {*os.listdir(folder or b".")} if os.path.isdir(folder or b".") else set()
        lacking = sorted({os.path.join(folder, name) for name in wanted if name not in there})
        missing += [shown(path) for path in lacking if not os.path.exists(path)]
    return missing


def _labels(parts):
    """-> the different labels as labels.found, how many examples have each, and which each example has, int64 [n]."""
    numbers, which = {}, []
    for part in parts:
        here, inverse = np.unique(part.rows.label[part.places], return_inverse=True)
        values = [part.rows.labels[k] for k in here.tolist()]
        which.append(np.array([numbers.setdefault(repr(v), (len(numbers), v))[0] for v in values])[inverse])
    which = np.concatenate(which)
    return labels.found([value for _, value in numbers.values()]), np.bincount(which), which


def open_list(path, split, channels, columns):
    """Raises DataError: no such list or split, lines without a path, files that are not there, labels that are no classes."""
    root, splits = _by_split(path, columns)
    parts, where = shards.of_split(splits, split, path), f"{path}, {split}"
    paths = Packed.of(itertools.chain(*(part.paths() for part in parts)))
    if missing := missing_files(paths):
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{where}: {len(missing)} of {len(paths)} files are not there: {few}. Paths are relative to the list.")
    hashes = np.fromiter(map(hash, paths), np.int64, len(paths))
    if repeated := len(paths) - len(np.unique(hashes)):
        logging.warning("%s: %d of %d lines name a file that another line names too.", where, repeated, len(paths))
    try:
        own, counts, which = _labels(parts)
        train = lambda: _labels(splits["train"])[0] if "train" in splits else own
        numbers, names, missing = labels.numbered(own, train, (), where, counts)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    logging.info("%s: %d images, %d classes", where, len(paths), len(names))
    held = dict(missing=missing, paths=paths, labels=tf.constant(narrow(numbers)[which]), folder=root)
    return ListSource("list", split, len(paths), names, channels, **held)
