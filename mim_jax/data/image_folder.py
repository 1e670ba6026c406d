"""Folders of images behind the interface of a source."""

import concurrent.futures
import dataclasses
import functools
import os

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import layout, slices
from mim_jax.data.augment import DataError
from mim_jax.data.listing import EXTENSIONS, Listing, by_parts, few, listed, shown
from mim_jax.data.source import WAYS, Source, evenly

FORMS = {".parquet": "parquet", ".tar": "webdataset", ".csv": "list", ".tsv": "list", ".jsonl": "list"}  # of other sources


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, read when they are needed. Names that are not UTF-8 are told with \\xNN, and read as they are."""

    paths: tf.Tensor = None  # string [n], below `folder`
    labels: tf.Tensor = None  # int32 [n]
    folder: bytes = b""  # data.path
    within: tuple[bytes, ...] = (b"",)  # the folders of the splits, below `folder`

    def load(self, item):
        place = tf.strings.join([self.folder, self.paths[item]], "/")
        return {"image": tf.io.read_file(place), "label": self.labels[item]}

    def describe(self, example_id):
        return shown(os.path.join(self.folder, self.paths[int(example_id)].numpy()))

    def file_name(self, example_id) -> str:
        return shown(self.paths[int(example_id)].numpy())

    def listing(self):
        """Paths below the folder of the split, so that it may be moved and renamed."""
        starts = [folder + b"/" if folder else b"" for folder in self.within]
        start = lambda path: len(starts[0]) if len(starts) == 1 else len(next(s for s in starts if path.startswith(s)))
        return [path[start(path) :] for path in self.paths.numpy().tolist()]

    def sizes(self, count):
        paths = tf.gather(self.paths, evenly(self.num_examples, count))
        return [_size(os.path.join(self.folder, path)) for path in paths.numpy().tolist()]


def _size(path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # gone since the listing; whoever reads it is told
        return -1


def open_folder(path, split, channels, folders="", holdout=0):
    """`folders`, `holdout`: data.folders and data.holdout, see docs/data.md; `split` may be a slice (data/slices.py).

    Raises DataError for a folder or a split that is not there or holds no images, and for folders that the rules do not
    decide. Labels may be missing, see Source.missing.
    """
    if not path:
        raise DataError(f"data.source=folder needs data.path; {WAYS}")
    if not os.path.isdir(path):
        raise DataError(f"data.path={path!r} is not a folder; {WAYS}")
    return _opened(listed(path), split, channels, folders, holdout)


@functools.lru_cache(maxsize=16)  # evaluators open the same splits
def _opened(listing: Listing, split, channels, folders, holdout) -> FolderSource:
    path, roots = shown(listing.root), layout.splits(listing, folders)
    if holdout and "validation" in roots:
        raise DataError(
            f"data.holdout={holdout} makes a validation split of the training images, and {path!r} has one in "
            f"{shown(roots['validation'])}/: use data.holdout=0, or say data.folders=train={shown(roots.get('train', b'.'))}"
        )
    pieces, used = [], []
    for name, low, high in slices.parse(split):
        root, bounds = _place(path, roots, name, holdout)
        inside, start = listing.below(root), len(root) + 1 if root else 0
        if not inside:
            held = listing.what(root) or "nothing at all"
            endings = " ".join(sorted(shown(e) for e in EXTENSIONS))
            forms = [form for ending, form in FORMS.items() if f" {ending}" in f" {held}"]
            hint = f" Is it data.source={forms[0]}?" if forms else ""
            raise DataError(f"No images in {os.path.join(path, shown(root))!r}: it holds {held}; read are {endings}.{hint}")
        chosen = slices.cut([p[start:] for p in inside], low, high, bounds)
        pieces.append(inside if len(chosen) == len(inside) else [inside[0][:start] + rest for rest in chosen])
        used.append(root)
    paths = pieces[0] if len(pieces) == 1 else sorted({p for piece in pieces for p in piece}, key=by_parts)
    if not paths:
        raise DataError(f"{split!r} of {path!r} holds none of the images: a hash of its name says where one stands; cut wider.")
    names, paths, labels, missing = _labelled(listing, roots, tuple(used), paths, folders)
    logging.info("folder %s: %d images of %s, %d classes", path, len(paths), split, len(names))
    return FolderSource(
        "folder", split, len(paths), names, channels, missing=missing, paths=tf.constant(paths, tf.string),
        labels=tf.constant(labels), folder=listing.root, within=tuple(used),
    )  # fmt: skip


def _place(path, roots, name, holdout):
    """A split -> its folder, and the shares of the images in it that are its own."""
    if holdout and name == "validation" and "train" in roots:
        return roots["train"], (1 - holdout / 100, 1.0)
    if name not in roots:
        raise DataError(
            f"data.path={path!r} has no split {name!r}; it has {', '.join(roots)}. Splits are folders called train, val (or "
            "validation, ...) and test in data.path; without them the whole folder is the split 'train'. data.holdout=10 "
            "takes a tenth of the training images for validation; data.folders=train=DIR,validation=DIR names the folders."
        )
    return roots[name], (0.0, 1 - holdout / 100 if name == "train" else 1.0)


def _first(path, root):
    """The class folder of a path below the folder of a split, or b""."""
    rest = path[len(root) + 1 :] if root else path
    return rest[: rest.index(b"/")] if b"/" in rest else b""


@functools.lru_cache(maxsize=8)  # what is said is said once
def _classes(listing: Listing, numbered: tuple[bytes, ...], folders: str):
    """The folders that number the classes -> (names of the classes, sorted, perhaps none; why there are none).

    Raises DataError for a class folder without images: it would change the numbers of the others.
    """
    place = few(os.path.join(shown(listing.root), shown(root)) for root in numbered)
    found = [_first(path, root) for root in numbered for path in listing.below(root)]
    names, loose = sorted({*found} - {b""}), found.count(b"")
    if folders == "unlabelled":
        return (), "data.folders=unlabelled: folders are no classes"
    if not names:
        return (), f"the images of {place} lie in no class folders"
    if len(names) == 1:
        logging.warning("%s: one class folder (%s), so that every label is the same", place, shown(names[0]))
    if loose and folders != "classes":
        words = f"{loose} images of {place} lie beside {len(names)} class folders ({few(map(shown, names))})"
        logging.warning("%s: all are read without labels; data.folders=classes leaves the %d out", words, loose)
        return (), words
    inside = [root + b"/" + name if root else name for root in numbered for name in listing.inside(root)]
    empty = [f for f in inside if os.path.basename(f) not in names and f not in listing.again]
    if empty:
        held = [f"{shown(f)}/ ({listing.what(f) or 'nothing'})" for f in empty]
        raise DataError(
            f"{len(empty)} class folders of {place} hold no image that is read: {few(held)}. Without them the classes would "
            f"be numbered otherwise: convert, move or delete them, or use data.folders=unlabelled."
        )
    return tuple(names), ""


def _labelled(listing: Listing, roots, used, paths, folders: str):
    """The images of a split -> names of the classes, paths, labels int32 [n], and why some of them are missing.

    Labels mean the same in every split: the training folder numbers the classes, and without it all splits together.
    """
    names, missing = _classes(listing, (roots["train"],) if "train" in roots else tuple(roots.values()), folders)
    if not names:
        return (), paths, np.full(len(paths), -1, np.int32), missing
    root_of = lambda path: next(root for root in used if not root or path.startswith(root + b"/"))
    found = [_first(path, used[0] if len(used) == 1 else root_of(path)) for path in paths]
    place = few(os.path.join(shown(listing.root), shown(root)) for root in dict.fromkeys(used))
    if (loose := found.count(b"")) and folders == "classes":
        logging.warning("%s: %d images beside the class folders are left out", place, loose)
        paths, found = zip(*((path, name) for path, name in zip(paths, found) if name))
    elif loose == len(found):
        return (), paths, np.full(loose, -1, np.int32), f"the images of {place} lie in no class folders"
    elif loose:
        missing = f"{loose} of {len(found)} images of {place} lie in no class folders"
    number = {name: k for k, name in enumerate(names)}
    if unknown := sorted({*found} - {b"", *names}):
        missing = f"{place} has classes that {shown(roots['train'])!r} has not: {few(map(shown, unknown))}"
    labels = np.array([number.get(name, -1) for name in found], np.int32)
    return tuple(map(shown, names)), list(paths), labels, missing


def check_folder(path, threads=8):
    """Folder -> sorted paths of the images in it that cannot be read. Decodes every one of them."""
    listing = listed(path)
    paths, labels = tf.constant(listing.files, tf.string), tf.fill([len(listing.files)], -1)
    source = FolderSource("folder", "", len(listing.files), (), 3, paths=paths, labels=labels, folder=listing.root)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        broken = pool.map(source.is_broken, range(source.num_examples))
        return [source.describe(i) for i, is_broken in enumerate(broken) if is_broken]
