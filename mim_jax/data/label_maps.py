"""Images with a class for every pixel: a folder of images/ and labels/, or ADE20K's, behind the interface of a source."""

import concurrent.futures
import dataclasses
import io
import os

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from mim_jax.data import slices
from mim_jax.data.augment import DataError
from mim_jax.data.class_file import IGNORED, Classes, read_classes
from mim_jax.data.decoding import in_bytes
from mim_jax.data.listing import EXTENSIONS, few, shown
from mim_jax.data.packed_names import Packed
from mim_jax.data.source import Source, evenly

LABELS = ("labels", "annotations")
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test", "testing")}
CHECKED = 1000  # training pairs at most that are read before anything is computed
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises
NAMED = 20  # files in one message
LAYOUT = (
    "DATA/images/train/NAME.jpg with DATA/labels/train/NAME.png, and so for validation; without such folders all are 'train'"
)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMapSource(Source):
    """Image files, and for each a PNG of the same name."""

    images: Packed = None  # below `folder`
    maps: Packed = None
    folder: bytes = b""
    classes: Classes = None
    mapped = True

    @property
    def colours(self) -> tuple:
        return self.classes.colours

    def load(self, item):
        of = lambda names: tf.io.read_file(tf.strings.join([self.folder, names.lookup(item)], "/"))
        numbers = tf.numpy_function(self.numbered, [of(self.maps)], tf.uint8, stateful=False)
        return {"image": of(self.images), "label": tf.constant(-1), "label_map": tf.ensure_shape(numbers, [None, None])}

    def numbered(self, data):
        try:
            with Image.open(io.BytesIO(in_bytes(data))) as image:
                return self.classes.numbered(image)
        except DataError:
            raise
        except UNREADABLE as error:
            raise DataError(f"the label map cannot be read: {error}") from error

    def describe(self, example_id):
        return shown(os.path.join(self.folder, self.images[int(example_id)]))

    def file_name(self, example_id) -> str:
        return shown(self.images[int(example_id)])

    def listing(self):
        return self.images

    def sizes(self, count):
        return [os.path.getsize(os.path.join(self.folder, self.maps[int(i)])) for i in evenly(self.num_examples, count)]

    def looked(self, i):
        """-> the file of a pair that cannot be used and why, or None; the file where only the image cannot be read, or None;
        the classes that are there, bool [256]."""
        image, label_map = (os.path.join(self.folder, names[int(i)]) for names in (self.images, self.maps))
        there = np.zeros(256, bool)
        try:
            with Image.open(image) as opened:
                sides = opened.size
        except UNREADABLE as error:
            return None, (shown(image), f"the image cannot be read: {error}"), there
        try:
            with Image.open(label_map) as opened:
                if opened.size != sides:
                    (w, h), (wide, high) = opened.size, sides
                    words = f"the label map is {h}x{w}, its image {high}x{wide} (height x width)"
                    return (shown(label_map), words), None, there
                there = np.bincount(self.classes.numbered(opened).ravel(), minlength=256) > 0
        except UNREADABLE as error:
            return (shown(label_map), str(error)), None, there
        return None, None, there

    def require_sound(self, count: int = 0):
        self.check(count or self.num_examples, images=True)

    def check(self, count: int, images: bool = False):
        """Reads so many pairs, spread evenly, and warns of classes that none of them has.

        Raises DataError, naming them, for pairs that cannot be used; those whose image cannot be read only where `images`.
        """
        ids = evenly(self.num_examples, count)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            looked = list(pool.map(self.looked, ids))
        wrong = [pair or images and image for pair, image, _ in looked if pair or images and image]
        if wrong:
            more = f"; they are {few((file for file, _ in wrong), NAMED)}" if len(wrong) > 1 else ""
            raise DataError(
                f"{len(wrong)} of {len(ids)} pairs of '{self.split}' cannot be used; the first: {': '.join(wrong[0])}{more}"
            )
        there = np.any([classes for *_, classes in looked], 0)
        absent = [name for name, met in zip(self.class_names, there) if not met]
        if absent and not images:  # said when the split was opened
            words = f"no pixel of {len(ids)} label maps of '{self.split}' is of {few(absent)} ({len(absent)} of"
            aside = "; some are 255 or 'ignored', which count nowhere" if there[IGNORED] else ""
            logging.warning("%s: %s %d classes)%s", shown(self.folder), words, self.num_classes, aside)


def open_label_maps(path: str, split: str, channels: int, holdout: int = 0) -> LabelMapSource:
    """`split` may be a slice (data/slices.py); `holdout` takes so many percent of the training images for the validation split
    that is not there.

    Raises DataError: folders, pairs or the file of the classes are not there; a label map that is of another size than its
    image, or has values that no class has (of CHECKED pairs, spread evenly).
    """
    if not os.path.isdir(path or ""):
        raise DataError(f"data.path={path!r} is not a folder; data.source=label_maps reads {LAYOUT}.")
    below = next((name for name in LABELS if os.path.isdir(os.path.join(path, name))), None)
    if below is None or not os.path.isdir(os.path.join(path, "images")):
        raise DataError(f"{path!r} has no folders images/ and labels/ (or annotations/); it should hold {LAYOUT}.")
    classes, pairs = read_classes(path), {}
    for name, low, high in slices.parse(split):
        found, bounds = _of_split(path, below, name, holdout)
        names = Packed.of(map(os.fsencode, sorted(found)))
        chosen = names.take(np.arange(len(names))[slices.cut(names, low, high, bounds)])
        pairs |= {image: found[os.fsdecode(image)] for image in chosen}
    if not pairs:
        raise DataError(f"{split!r} of {path!r} holds no images with label maps; cut wider.")
    files = dict(images=Packed.of(pairs), maps=Packed.of(map(os.fsencode, pairs.values())), folder=os.fsencode(path))
    source = LabelMapSource("label_maps", split, len(pairs), classes.names, channels, classes=classes, **files)
    source.check(CHECKED)
    logging.info("label maps %s: %d images of %s, %d classes", path, len(pairs), split, len(classes.names))
    return source


def _of_split(path: str, below: str, name: str, holdout: int):
    """-> {image: its label map}, both below `path`, and the shares of them that are of the split."""
    inside = sorted(entry.name for entry in os.scandir(os.path.join(path, "images")) if entry.is_dir())
    folders = {split: folder for split, known in SPLITS.items() for folder in inside if folder in known} or {"train": ""}
    if holdout and "validation" in folders:
        raise DataError(f"data.holdout={holdout}: {path!r} has a validation split ({folders['validation']}/); use 0.")
    bounds = (0.0, 1.0)
    if holdout and name in ("train", "validation"):
        bounds = (1 - holdout / 100, 1.0) if name == "validation" else (0.0, 1 - holdout / 100)
        folders.setdefault("validation", folders.get("train"))
    if folders.get(name) is None:
        words = f"it has {', '.join(folders)}; data.holdout=10 takes a tenth of the training images for validation"
        raise DataError(f"{path!r} has no split {name!r}: {words}.")
    images, maps = _files(path, "images", folders[name], EXTENSIONS), _files(path, below, folders[name], {b".png"})
    alone = sorted({*images} ^ {*maps})
    if alone or not images:
        missing = [f"{stem} ({'no label map' if stem in images else 'no image'})" for stem in alone]
        raise DataError(f"{path!r}, {name}: {len(alone)} of {len({*images, *maps})} lack their pair: {few(missing) or 'none'}")
    return {images[stem]: maps[stem] for stem in images}, bounds


def _files(path: str, kind: str, folder: str, endings) -> dict:
    """-> {path without ending, below the folder: path below `path`}. Raises DataError for two that differ in the ending."""
    root, found = os.path.join(path, kind, folder), {}
    for place, _, names in os.walk(root):
        for name in names:
            stem, ending = os.path.splitext(name)
            if os.fsencode(ending.lower()) in endings and not name.startswith("."):
                file = os.path.join(place, name)
                key, below = os.path.relpath(os.path.join(place, stem), root), os.path.relpath(file, path)
                if found.setdefault(key, below) != below:
                    raise DataError(f"{path!r}: {found[key]} and {below} would have the same label map; rename or remove one")
    return found
