"""Where examples come from: TFDS, an image folder or the embedded sample, behind one interface."""

import collections
import concurrent.futures
import dataclasses
import os

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import augment
from mim_jax.data.augment import DataError
from mim_jax.data.sample import photos

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
WAYS = """provide data in one of three ways:
  TFDS:          data.source=imagenet2012 data.data_dir=DIR, a folder prepared once with
                 tfds build imagenet2012 --data_dir=DIR --manual_dir=TARS --file_format=array_record
  image folder:  data.source=folder data.path=DIR, with DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg,
                 or any folder of images without labels
  sample:        data.source=sample (a few photographs bundled with scikit-image and scikit-learn)"""


class NotPrepared(DataError):
    """The data set is known and not there; the first line of the message says how to get it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A split of labelled or unlabelled images; examples are numbered 0 .. num_examples - 1.

    Without `random_access`, `stream` replaces `lookup`. `load` works inside tf.data. With `label_sets` an example may have
    several classes, or none.
    """

    name: str
    split: str
    num_examples: int
    num_classes: int  # 0 without labels
    class_names: tuple[str, ...]
    channels: int
    random_access: bool = True
    bulk: bool = False  # lookup is worth calling with many ids at once
    label_sets: bool = False

    def lookup(self, ids):
        """int64 [b] -> items [b]: what `load` needs of each example."""
        return ids

    def load(self, item):
        """One item -> (bytes or uint8 [h w c], label int32 []; -1 without labels; of label sets uint8 [classes], 0 or 1)."""
        raise NotImplementedError

    def stream(self, low, high, seed=None):
        """The examples low .. high - 1 as a tf.data.Dataset of (id, item), shuffled if there is a seed [2]."""
        raise NotImplementedError(f"{self.name} has random access")

    def describe(self, example_id):
        """What a person calls the example: a path, or a place in the split."""
        return f"example {example_id} of {self.name!r}, split {self.split!r}"

    def file_name(self, example_id) -> str:
        """A name of the example for tables: its path below data.path, or "<split>/<id>"."""
        return f"{self.split}/{int(example_id)}"

    def no_labels(self, count: int):
        """-> [count] or [count classes] of numpy: what `load` gives of examples that are not there."""
        return np.zeros((count, self.num_classes), np.uint8) if self.label_sets else np.full(count, -1, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images in memory, all of one size."""

    images: tf.Tensor = None  # uint8 [n h w c]
    labels: tf.Tensor = None  # int32 [n]

    def load(self, item):
        return self.images[item], self.labels[item]


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, read when they are needed."""

    paths: tf.Tensor = None  # string [n]
    labels: tf.Tensor = None  # int32 [n]
    folder: str = ""  # what the user named: data.path

    def load(self, item):
        return tf.io.read_file(self.paths[item]), self.labels[item]

    def describe(self, example_id):
        return self.paths[int(example_id)].numpy().decode()

    def file_name(self, example_id) -> str:
        return os.path.relpath(self.describe(example_id), self.folder)


def open_source(name, split, *, path="", data_dir="", channels=3, label_sets=False):
    """Opens a split. `name` is "sample", "folder" (with `path`) or a TFDS dataset (with `data_dir`).

    `split` is "train", "validation" or "test", and what the source adds: TFDS slices such as "train[:1%]",
    and "train_tiles" for the sample, which is always gray. A TFDS dataset with several labels per example (ReaL) counts
    as one without labels unless `label_sets`.

    Raises:
      DataError: the data or the split does not exist, or the options do not fit together; NotPrepared, its kin, for a
        TFDS dataset that is not in `data_dir`.
    """
    if channels not in (1, 3):
        raise DataError(f"data.channels={channels}: images are decoded to 3 (colour) or 1 (gray) channels.")
    if path and name != "folder":
        raise DataError(
            f"data.path={path!r} is read with data.source=folder only, not with {name!r}; "
            "the folder of a TFDS dataset is data.data_dir."
        )
    if name == "sample":
        return _open_sample(split)
    if name == "folder":
        return _open_folder(path, split, channels)
    from mim_jax.data import tfds_source  # here, so that the other sources need no TFDS

    return tfds_source.open_tfds(name, split, data_dir=data_dir, channels=channels, label_sets=label_sets)


def _open_sample(split):
    images, labels, skipped = photos.load(split)
    logging.info("sample, split %s: %d images of %d px, %d flat ones skipped", split, len(images), images.shape[1], skipped)
    return ArraySource(
        "sample", split, len(images), len(photos.NAMES), photos.NAMES, 1, images=tf.constant(images), labels=tf.constant(labels)
    )


def list_images(root):
    """Folder -> sorted relative paths of its images, at any depth, and a count of the other files by extension."""
    found, others = [], collections.Counter()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith(".") or extension not in EXTENSIONS:
                others[extension or name] += 1
            else:
                found.append(os.path.relpath(os.path.join(folder, name), root))
    return sorted(found, key=lambda p: p.split(os.sep)), others


def _split_roots(path):
    """Folder -> {split: its folder}; a folder without split folders is all "train"."""
    roots = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if os.path.isdir(os.path.join(path, name)):
                roots.setdefault(split, os.path.join(path, name))
    return roots or {"train": path}


def _class_names(files, root):
    """Relative paths -> sorted names of the first-level folders; () where they say nothing."""
    folders = sorted({p.split(os.sep)[0] for p in files if os.sep in p})
    loose = [p for p in files if os.sep not in p]
    if folders and loose:
        logging.warning(
            "%s holds both class folders and %d loose images (%s, ...): it is read without labels.", root, len(loose), loose[0]
        )
    return () if loose or len(folders) < 2 else tuple(folders)


def _open_folder(path, split, channels):
    if not path:
        raise DataError(f"data.source=folder needs data.path; {WAYS}")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise DataError(f"data.path={path!r} is not a folder; {WAYS}")
    roots = _split_roots(path)
    if split not in roots:
        raise DataError(
            f"data.path={path!r} has no split {split!r}; it has {', '.join(roots)}. Splits are the folders train, "
            "val (or validation) and test in data.path; without them the whole folder is the split 'train'."
        )
    root = roots[split]
    files, others = list_images(root)
    if not files:
        count = ", ".join(f"{n} {extension}" for extension, n in others.most_common(5)) or "nothing at all"
        raise DataError(f"No images in {root!r}: it holds {count}; read are {' '.join(EXTENSIONS)}.")

    # Labels must mean the same in every split, so the training folders number the classes.
    numbered = roots.get("train", root)
    names = _class_names(files if numbered == root else list_images(numbered)[0], numbered)
    labels = np.full(len(files), -1, np.int32)
    if names:
        number = {name: k for k, name in enumerate(names)}
        folders = [p.split(os.sep)[0] if os.sep in p else None for p in files]
        unknown = sorted({str(f) for f in folders if f not in number})
        if unknown:
            raise DataError(
                f"{root!r} has classes that {numbered!r} has not: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''} (None: images outside a class folder)."
            )
        labels = np.array([number[f] for f in folders], np.int32)
    logging.info("folder %s: %d images, %d classes", root, len(files), len(names))
    return FolderSource(
        "folder",
        split,
        len(files),
        len(names),
        names,
        channels,
        paths=tf.constant([os.path.join(root, p) for p in files]),
        labels=tf.constant(labels),
        folder=path,
    )


def check_folder(path, threads=8):
    """Folder -> sorted paths of the images in it that cannot be read. Decodes every one of them."""

    def broken(file):
        try:
            augment.decode(tf.io.read_file(file), 3)
        except Exception:  # pylint: disable=broad-except  # PIL and TensorFlow raise a dozen kinds
            return file
        return None

    files = [os.path.join(path, p) for p in list_images(path)[0]]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return [file for file in pool.map(broken, files) if file]
