"""Folders of images: which files, which splits, which classes."""

import collections
import concurrent.futures
import dataclasses
import os

import tensorflow as tf
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.source import WAYS, Source

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}  # folder -> split; the last wins


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, read when they are needed."""

    paths: tf.Tensor = None  # string [n]
    labels: tf.Tensor = None  # int32 [n]
    folder: str = ""  # what the user named: data.path

    def load(self, item):
        return {"image": tf.io.read_file(self.paths[item]), "label": self.labels[item]}

    def describe(self, example_id):
        return self.paths[int(example_id)].numpy().decode()

    def file_name(self, example_id) -> str:
        return os.path.relpath(self.describe(example_id), self.folder)


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
    roots = {split: os.path.join(path, name) for name, split in SPLITS.items() if os.path.isdir(os.path.join(path, name))}
    return roots or {"train": path}


def _class_names(files, root):
    """Relative paths -> sorted names of the first-level folders; () where they say nothing."""
    folders = sorted({p.split(os.sep)[0] for p in files if os.sep in p})
    loose = [p for p in files if os.sep not in p]
    if folders and loose:
        found = f"both class folders and {len(loose)} loose images ({loose[0]}, ...)"
        logging.warning("%s holds %s: it is read without labels.", root, found)
    return () if loose or len(folders) < 2 else tuple(folders)


def open_folder(path, split, channels):
    """Raises DataError for a folder or a split that is not there, or holds no images or other classes than `train`."""
    if not path:
        raise DataError(f"data.source=folder needs data.path; {WAYS}")
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
    number = {name: k for k, name in enumerate(names)}
    folders = [p.split(os.sep)[0] if os.sep in p else None for p in files]
    unknown = sorted({str(f) for f in folders if names and f not in number})
    if unknown:
        few = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise DataError(f"{root!r} has classes that {numbered!r} has not: {few} (None: images outside a class folder).")
    logging.info("folder %s: %d images, %d classes", root, len(files), len(names))
    paths = tf.constant([os.path.join(root, p) for p in files])
    labels = tf.constant([number.get(f, -1) for f in folders], tf.int32)
    return FolderSource("folder", split, len(files), names, channels, paths=paths, labels=labels, folder=path)


def check_folder(path, threads=8):
    """Folder -> sorted paths of the images in it that cannot be read. Decodes every one of them."""
    files = [os.path.join(path, p) for p in list_images(path)[0]]
    labels = tf.fill([len(files)], -1)
    source = FolderSource("folder", "", len(files), (), channels=3, paths=tf.constant(files, tf.string), labels=labels)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return [file for file, broken in zip(files, pool.map(source.is_broken, range(len(files)))) if broken]
