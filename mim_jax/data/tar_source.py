"""Tar shards as webdataset writes them: the members of a sample share the path up to the first dot."""

import dataclasses
import os
import tarfile

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import labels, shards
from mim_jax.data.augment import DataError
from mim_jax.data.packed_names import Numbered, gathered, narrow
from mim_jax.data.source import evenly
from mim_jax.data.tar_index import BLOCK, Index, index_of
from mim_jax.paths import expanded

CLASS_FILES = ("classes.txt", "classnames.txt")  # one name a line, in the order of the numbers


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource(shards.ShardSource):
    """Each image is read on its own, from where the index says."""

    files: tuple[str, ...] = ()
    index: Index = None
    folder: str = ""  # that all files are below

    def fetch(self, ids):
        images = [b""] * len(ids)
        for k in np.argsort(ids, kind="stable").tolist():  # so that the disk is read in one direction
            file, i = self._file(ids[k]), ids[k]
            try:
                with shards.stream(file) as opened:
                    opened.seek((int(self.index.header[i]) + int(self.index.start[i])) * BLOCK)
                    images[k] = opened.read(int(self.index.size[i]))
            except OSError as error:
                logging.warning("%s cannot be read: %s", file, error)
        return images

    def _file(self, example_id):
        return self.files[int(np.searchsorted(self.index.firsts, int(example_id), "right")) - 1]

    def _member(self, example_id):
        """-> shard, name of the image in it."""
        file = self._file(example_id)
        try:
            with shards.stream(file) as opened:
                opened.seek(int(self.index.header[int(example_id)]) * BLOCK)
                return file, tarfile.open(fileobj=opened, mode="r:").next().name
        except (OSError, tarfile.TarError, AttributeError):
            return file, f"example {int(example_id)}"

    def describe(self, example_id):
        file, name = self._member(example_id)
        return f"{name} in {file}"

    def file_name(self, example_id) -> str:
        file, name = self._member(example_id)
        return f"{os.path.relpath(file, self.folder)}/{name}"

    def listing(self):
        """The shard and the place in it, for the name of the member stands there alone."""
        names = [os.fsencode(os.path.relpath(file, self.folder)) for file in self.files]
        ends = [*self.index.firsts[1:], self.num_examples]
        parts = [(name, self.index.header[a:b]) for name, a, b in zip(names, self.index.firsts, ends)]
        return Numbered(parts, BLOCK)

    def sizes(self, count):
        return self.index.size[evenly(self.num_examples, count)].tolist()


def _class_names(folders):
    """The lines of the first file of class names in one of the folders, or ()."""
    for place in (expanded(folder) / name for folder in folders for name in CLASS_FILES):
        if place.exists():
            logging.info("class names: %s", place)
            return tuple(line.strip() for line in place.read_text().splitlines() if line.strip())
    return ()


def _labels(index):
    """-> the different labels as labels.found, none being the last, and how many examples have each."""
    some = (index.label[k : k + 2**20] for k in range(0, len(index.label), 2**20))
    counts = np.roll(sum(np.bincount(part.astype(int) + 1, minlength=len(index.words) + 1) for part in some), -1)
    own = labels.found(index.words.tolist())
    return np.append(own, np.array(["" if own.dtype == object else -1], own.dtype)), counts


def open_tar(path, split, channels, columns):
    """Raises DataError: no such shards or split, a shard that is no whole tar, no image, or labels that are no classes."""
    root, splits = shards.by_split("webdataset", path, (".tar",))
    files = shards.of_split(splits, split, path)
    index = index_of(files, root, columns)
    count, left = len(index.label), ", ".join(index.said.tolist())
    if not count:
        raise DataError(f"No images in the {len(files)} tar shards of {split!r} in {path!r}; they hold {left or 'nothing'}.")
    if left:
        logging.warning("%s, split %s: beside %d images there are, not read: %s", path, split, count, left)
    of_train = splits.get("train", files)
    train = lambda: _labels(index if of_train is files else index_of(of_train, root, columns))[0]
    (own, counts), given = _labels(index), _class_names(dict.fromkeys([root, *map(os.path.dirname, files)]))
    numbers, names, missing = labels.numbered(own, train, given, f"{path}, {split}", counts)
    logging.info("%s, split %s: %d images in %d shards, %d classes", path, split, count, len(files), len(names))
    numbers, index = gathered(narrow(numbers), index.label), dataclasses.replace(index, label=index.label[:0].copy())
    held = dict(missing=missing, labels=tf.constant(numbers), files=tuple(files), index=index, folder=root)
    return TarSource("webdataset", split, count, names, channels, **held)
