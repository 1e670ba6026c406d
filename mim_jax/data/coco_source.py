"""COCO and data sets in its form: a json of boxes and masks for each split, and folders of images.

The json of a split is found by the rules of data/shards.py, a word such as train or val in its name or folder. Of several for
one split those called instances_*.json count; keypoints, captions and others are not read.
"""

import dataclasses
import itertools
import os
import re

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import coco_annotations, shards
from mim_jax.data.augment import DataError
from mim_jax.data.list_source import missing_files
from mim_jax.data.listing import shown
from mim_jax.data.object_source import ObjectSource
from mim_jax.data.packed_names import Changed, Packed
from mim_jax.data.source import evenly
from mim_jax.data.subset import Subset, sliced

PREFERRED = "instances"
TRIED = 20  # images that are looked for in a folder


@dataclasses.dataclass(frozen=True, eq=False)
class CocoSource(ObjectSource):
    """Image files, read when they are needed."""

    paths: Packed = None  # in full
    folder: str = ""

    def image(self, item):
        return tf.io.read_file(self.paths.lookup(item))

    def with_images(self, ids):
        return {"paths": self.paths.take(ids)}

    def describe(self, example_id):
        return shown(self.paths[int(example_id)])

    def file_name(self, example_id) -> str:
        return shown(self.paths[int(example_id)].removeprefix(os.fsencode(self.folder) + b"/"))

    def listing(self):
        start = os.fsencode(self.folder) + b"/"
        return Changed(self.paths, lambda path: path.removeprefix(start))

    def sizes(self, count):
        return [os.stat(path).st_size for path in self.paths.take(evenly(self.num_examples, count))]


def open_coco(path, split, channels, holdout=0) -> CocoSource:
    """Raises DataError: no such json or split, several for one, images that are not there, and what coco_annotations says."""
    root, found = shards.by_split("coco", path, (".json",))
    splits = {name: _one(files, name, path) for name, files in found.items()}
    opened = sliced(lambda name: _whole(root, shards.of_split(splits, name, path), name, channels), split, holdout)
    return dataclasses.replace(opened.of.take(opened.ids), split=split) if isinstance(opened, Subset) else opened


def _one(files, split, path):
    """-> the json of a split. Raises DataError where there are several."""
    chosen = [file for file in files if os.path.basename(file).startswith(PREFERRED)] or files
    if len(chosen) > 1:
        names = ", ".join(os.path.relpath(file, path) for file in chosen[:3])
        which = "a pattern as data.path says which: DIR/annotations/instances_{train,val}2017.json"
        raise DataError(f"data.path={path!r} has {len(chosen)} json files for {split!r}: {names}; {which}.")
    return chosen[0]


def _whole(root, file, split, channels):
    read = coco_annotations.read(file)
    folder = _image_folder(root, file, split, read.files)
    paths = Packed.of(os.fsencode(os.path.join(folder, name)) for name in read.files)
    numbers, names = zip(*read.categories)
    logging.info("%s: %d images in %s, %d classes", file, len(read.files), folder, len(names))
    held = dict(category_ids=numbers, image_ids=read.image_ids, sides=read.sides, objects=read.objects, paths=paths)
    why = "the objects in them have classes, the images have none"
    options = dict(missing=why, version=read.digest, folder=folder, **held)
    return CocoSource("coco", split, len(paths), names, channels, **options)


def _image_folder(root, file, split, names) -> str:
    """The folder that file names of a json are relative to: the first of those that data sets have in which they are.

    Raises DataError for images that are not there.
    """
    stem, here = os.path.basename(file).removesuffix(".json"), os.path.dirname(file) or "."
    words = [word for word in re.split(r"[^A-Za-z0-9]+", stem) if shards.split_word(word)]
    words += [word for word, meant in shards.SPLITS.items() if meant == split]
    inside = ["", *words, "images", *(f"images/{word}" for word in words), *(f"{word}/images" for word in words)]
    above = dict.fromkeys([here, os.path.dirname(here) or ".", root])
    tried = [os.path.normpath(os.path.join(start, below)) for start, below in itertools.product(above, inside)]
    some = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), TRIED)).astype(int)]
    there = {folder: sum(os.path.exists(os.path.join(folder, name)) for name in some) for folder in tried}
    best = max(there, key=there.get) if there else here
    missing = missing_files([os.fsencode(os.path.join(best, name)) for name in names])
    if missing and not there[best]:
        shown_folders = ", ".join(sorted({folder for folder in tried if os.path.isdir(folder)})[:6])
        raise DataError(
            f"{file} names {len(names)} images, such as {names[0]!r}, and none is there; looked in {shown_folders}."
        )
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{file}: {len(missing)} of its {len(names)} images are not in {best}: {few}.")
    return best
