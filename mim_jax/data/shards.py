"""Which files hold which split, by stated rules; and what sources that read many images out of large files have in common.

The rules, for the path of a file below data.path:
1. NAME-00000-of-00010...: the split is NAME, as Hugging Face and TFDS name their files.
2. Else a word of the file's name, or the name of a folder above it, that means a split (SPLITS): imagenet-train-0001.tar.
3. Where no file says anything, all are "train".
Two different splits in one path are refused, and so are several folders that have the same split; a pattern says it outright.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import io
import itertools
import os
import re

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.source import WAYS, Source
from mim_jax.paths import expanded

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NUMBERED = re.compile(r"(\w+)-\d+-of-\d+")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
THREADS = 16  # that look at files at the start


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSource(Source):
    """Encoded images in large files, read by Python, many at once. A class of it offers `fetch` and `describe`."""

    labels: tf.Tensor = None  # whole numbers [n]
    bulk = True

    def fetch(self, ids):
        """int64 numpy [b] -> list of bytes; of one that cannot be read b"", which no decoder takes, so that it is named."""
        raise NotImplementedError

    def lookup(self, ids):
        fetch = lambda wanted: np.array(self.fetch(wanted), object)
        images = tf.numpy_function(fetch, [ids], tf.string, stateful=False)
        return {"image": tf.ensure_shape(images, ids.shape), "label": tf.cast(tf.gather(self.labels, ids), tf.int32)}

    def load(self, item):
        return item


def split_word(text):
    """ "Val_images-01" -> {"validation"}: the splits that its words mean."""
    return {SPLITS[word] for word in re.findall("[a-z]+", text.lower()) if word in SPLITS}


def split_of(relative):
    """Path below data.path -> its split, "" where nothing says it, and the folder that has the split. Raises DataError."""
    *folders, name = relative.split("/")
    if stated := NUMBERED.match(name):
        return SPLITS.get(stated[1].lower(), stated[1]), "/".join(folders)
    said = {depth: words for depth, part in enumerate([*folders, name]) if (words := split_word(part))}
    splits = sorted(set().union(*said.values()))
    if len(splits) > 1:
        words = "say which files are meant by a pattern, or by a folder further down, as data.path"
        raise DataError(f"{relative!r} may be of {' or '.join(map(repr, splits))}: {words}.")
    return (splits[0], "/".join(folders[: min(said)])) if splits else ("", "")


def listed(root, endings):
    """Folder -> sorted relative paths, parted by "/", of its files with these endings, at any depth; hidden ones are none."""
    found, seen = [], set()
    walk = expanded(root).walk() if "://" in root else os.walk(root, followlinks=True)
    for folder, subfolders, files in walk:
        real = os.path.realpath(folder) if "://" not in root else os.fspath(folder)
        if real in seen:  # a link that leads up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = "" if os.fspath(folder) == os.fspath(root) else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        found += [below + name for name in files if not name.startswith(".") and name.lower().endswith(endings)]
    return sorted(found, key=lambda path: path.split("/"))


def spelt_out(pattern):
    """ "a-{00..02}.tar", "{a,b}.tar" -> the paths it stands for."""
    if not (braces := BRACES.search(pattern)):
        return [pattern]
    first, last, words = braces.groups()
    parts = words.split(",") if words else [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)]
    return list(itertools.chain(*(spelt_out(pattern[: braces.start()] + part + pattern[braces.end() :]) for part in parts)))


def _of_pattern(name, path):
    """-> (fixed folder, paths below it). Raises DataError for a part of the pattern that matches nothing."""
    fixed = re.split(r"[*?\[{]", path)[0].rpartition("/")[0] or "."
    root, found, missing = expanded(fixed), [], []
    for part in spelt_out(path):
        if "://" in part:
            there = [os.fspath(p) for p in root.glob(part[len(fixed) + 1 :])]
        else:
            there = glob.glob(part, recursive=True)
        found += there
        missing += [] if there else [part]
    if missing:
        raise DataError(f"data.path={path!r}, data.source={name}: there is no {missing[0]!r} ({len(missing)} such).")
    below = sorted({os.path.relpath(p, fixed).replace(os.sep, "/") for p in found}, key=lambda p: p.split("/"))
    return fixed, below


def by_split(name, path, endings):
    """data.path, a file, folder or pattern -> the folder all is below, {split: its files, sorted}.

    Raises DataError where there is none, or doubt.
    """
    if not path:
        raise DataError(f"data.source={name} needs data.path; {WAYS}")
    place, pattern = expanded(path), bool(re.search(r"[*?\[{]", path))
    if place.is_dir():
        root, files, pattern = path.rstrip("/") or "/", listed(path.rstrip("/") or "/", endings), False
        if not files:
            count = collections.Counter(os.path.splitext(file)[1].lower() for file in listed(path, ("",))).most_common(5)
            held = ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in count) or "nothing"
            raise DataError(f"data.path={path!r} holds no {' or '.join(endings)} file, but {held}; {WAYS}")
    elif place.exists():
        root, files, pattern = os.path.dirname(path) or ".", [os.path.basename(path)], False
    elif pattern:
        root, files = _of_pattern(name, path)
    else:
        raise DataError(f"data.path={path!r} is neither a file nor a folder nor a pattern of files; {WAYS}")
    splits, folders = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for file in files:
        split, folder = split_of(file)
        splits[split].append(f"{root}/{file}" if root != "/" else f"/{file}")
        folders[split][folder] += 1
    doubtful = [] if pattern else [split for split in folders if len(folders[split]) > 1]
    if doubtful:
        count = ", ".join(f"{n} in {folder or '.'!r}" for folder, n in sorted(folders[doubtful[0]].items()))
        both = "one of these folders as data.path reads it alone, a pattern such as DIR/**/train*" + endings[0]
        raise DataError(
            f"data.path={path!r} has files of {doubtful[0] or 'no'!r} split in several folders: {count}; {both} all."
        )
    unnamed = splits.pop("", [])
    if unnamed and splits:
        logging.warning("%s: %d files that name no split are not read (%s, ...).", path, len(unnamed), unnamed[0])
    return root, dict(splits) or {"train": unnamed}


class NoSplit(DataError):
    """The data is there, and has no such split."""


def of_split(splits, split, path):
    """Raises NoSplit, naming the splits that are there, for another one."""
    if split not in splits:
        words = "; data.holdout=10 takes a tenth of the training images for it" if split == "validation" else ""
        raise NoSplit(f"data.path={path!r} has no split {split!r}; it has {', '.join(splits)}{words}.")
    return splits[split]


class _Bucket(io.RawIOBase):
    """A file of a bucket as Python has files: TensorFlow's lacks what tarfile, pyarrow and text need."""

    def __init__(self, path):
        self._file, self._place = tf.io.gfile.GFile(path, "rb"), 0
        self._size = self._file.size()

    readable = seekable = lambda self: True

    def seek(self, offset, whence=io.SEEK_SET):
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer):
        self._file.seek(self._place)
        found = self._file.read(min(len(buffer), max(self._size - self._place, 0)))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def close(self):
        self._file.close()
        super().close()


def stream(path):
    """The bytes of a file, of a bucket too."""
    return io.BufferedReader(_Bucket(path), 2**20) if "://" in path else open(path, "rb")


def each(function, files):
    """Of every file, a few at once, in order."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, files))
