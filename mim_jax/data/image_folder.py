"""Folders of images behind the interface of a source."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import layout, slices
from mim_jax.data.augment import DataError
from mim_jax.data.listing import EXTENSIONS, Listing, by_parts, few, shown
from mim_jax.data.packed_names import Below, Packed, narrow
from mim_jax.data.source import WAYS, Source, evenly
from mim_jax.data.walk import listed

FORMS = {".parquet": "parquet", ".tar": "webdataset", ".csv": "list", ".tsv": "list", ".jsonl": "list"}  # of other sources


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, read when they are needed. Names that are not UTF-8 are told with \\xNN, and read as they are."""

    paths: Packed = None  # below `folder`
    labels: tf.Tensor = None  # whole numbers [n]
    folder: bytes = b""  # data.path
    within: tuple[bytes, ...] = (b"",)  # the folders of the splits, below `folder`

    def load(self, item):
        place = tf.strings.join([self.folder, self.paths.lookup(item)], "/")
        return {"image": tf.io.read_file(place), "label": tf.cast(self.labels[item], tf.int32)}

    def describe(self, example_id):
        return shown(os.path.join(self.folder, self.paths[int(example_id)]))

    def file_name(self, example_id) -> str:
        return shown(self.paths[int(example_id)])

    def listing(self):
        """Paths below the folder of the split, so that it may be moved and renamed."""
        starts = [folder + b"/" if folder else b"" for folder in self.within]
        if len(starts) == 1:
            return Below(self.paths, starts[0]) if starts[0] else self.paths
        return Packed.of(path[len(next(s for s in starts if path.startswith(s))) :] for path in self.paths)

    def sizes(self, count):
        return [_size(os.path.join(self.folder, path)) for path in self.paths.take(evenly(self.num_examples, count))]


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
    pieces, used = {}, []  # {folder of a split: (its images, the places of those that are wanted)}
    for name, low, high in slices.parse(split):
        root, bounds = _place(path, roots, name, holdout)
        inside = listing.below(root)
        if not len(inside):
            raise _no_images(listing, root)
        names = Below(inside.files, root + b"/") if root else inside.files
        chosen = slices.cut(names, low, high, bounds)
        pieces[root] = inside, _both(pieces[root][1], chosen, len(inside)) if root in pieces else chosen
        used.append(root)
    if not any(isinstance(ids, slice) or len(ids) for _, ids in pieces.values()):
        raise DataError(f"{split!r} of {path!r} holds none of the images: a hash of its name says where one stands; cut wider.")
    names, paths, labels, missing = _labelled(listing, roots, tuple(used), pieces, folders)
    logging.info("folder %s: %d images of %s, %d classes", path, len(paths), split, len(names))
    return FolderSource(
        "folder", split, len(paths), names, channels, missing=missing, paths=paths, labels=tf.constant(labels),
        folder=listing.root, within=tuple(used),
    )  # fmt: skip


def _both(ids, others, n):
    """Places, or slices of all n of them -> the places that are in one or both."""
    return np.union1d(np.arange(n)[ids], np.arange(n)[others])


def _no_images(listing, root):
    held = listing.what(root) or "nothing at all"
    endings = " ".join(sorted(shown(e) for e in EXTENSIONS))
    forms = [form for ending, form in FORMS.items() if f" {ending}" in f" {held}"]
    hint = f" Is it data.source={forms[0]}?" if forms else ""
    place = os.path.join(shown(listing.root), shown(root))
    return DataError(f"No images in {place!r}: it holds {held}; read are {endings}.{hint}")


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


@functools.lru_cache(maxsize=8)  # what is said is said once
def _classes(listing: Listing, numbered: tuple[bytes, ...], folders: str):
    """The folders that number the classes -> (names of the classes, sorted, perhaps none; why there are none).

    Raises DataError for a class folder without images: it would change the numbers of the others.
    """
    place = few(os.path.join(shown(listing.root), shown(root)) for root in numbered)
    found = collections.Counter()
    for root in numbered:
        first, which, counts = listing.below(root).first_folders(root)
        found.update(dict(zip(first, np.bincount(which, counts).astype(int).tolist())))
    names, loose = sorted({*found} - {b""}), found[b""]
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
    known = {*names}
    inside = [root + b"/" + name if root else name for root in numbered for name in listing.inside(root)]
    empty = [f for f in inside if os.path.basename(f) not in known and f not in listing.again]
    if empty:
        held = [f"{shown(f)}/ ({listing.what(f) or 'nothing'})" for f in empty]
        raise DataError(
            f"{len(empty)} class folders of {place} hold no image that is read: {few(held)}. Without them the classes would "
            f"be numbered otherwise: convert, move or delete them, or use data.folders=unlabelled."
        )
    return tuple(names), ""


def _labelled(listing: Listing, roots, used, pieces, folders: str):
    """The images of a split -> names of the classes, paths, labels [n], and why some of them are missing.

    Labels mean the same in every split: the training folder numbers the classes, and without it all splits together.
    """
    names, missing = _classes(listing, (roots["train"],) if "train" in roots else tuple(roots.values()), folders)
    number, found = {name: k for k, name in enumerate(names)}, collections.Counter()
    paths, labels = [], []
    for root, (images, ids) in sorted(pieces.items(), key=lambda piece: by_parts(piece[0])):
        first, which, counts = images.first_folders(root)
        if not isinstance(ids, slice):  # how many of each run are wanted
            counts = np.diff(np.searchsorted(ids, np.cumsum([0, *counts])))
        found.update(dict(zip(first, np.bincount(which, counts).astype(int).tolist())))
        if names and folders == "classes" and b"" in first:
            kept = np.repeat(which != first.index(b""), counts)
            ids, counts = np.arange(len(images))[ids][kept], counts * (which != first.index(b""))
        paths.append(images.files[ids] if isinstance(ids, slice) else images.files.take(ids))
        labels.append(np.repeat(narrow(np.array([number.get(name, -1) for name in first]))[which], counts))
    paths = paths[0] if len(paths) == 1 else Packed.of(itertools.chain(*paths))
    labels = labels[0] if len(labels) == 1 else np.concatenate(labels)
    if not names:
        return (), paths, labels, missing
    found = +found  # of what a slice has
    place, total = few(os.path.join(shown(listing.root), shown(root)) for root in dict.fromkeys(used)), found.total()
    if (loose := found[b""]) and folders == "classes":
        logging.warning("%s: %d images beside the class folders are left out", place, loose)
    elif loose == total:
        return (), paths, labels, f"the images of {place} lie in no class folders"
    elif loose:
        missing = f"{loose} of {total} images of {place} lie in no class folders"
    if unknown := sorted({*found} - {b"", *names}):
        missing = f"{place} has classes that {shown(roots['train'])!r} has not: {few(map(shown, unknown))}"
    return tuple(map(shown, names)), paths, labels, missing


def check_folder(path, threads=8):
    """Folder -> sorted paths of the images in it that cannot be read. Decodes every one of them."""
    listing = listed(path)
    paths, count = listing.images.files, len(listing.images)
    source = FolderSource("folder", "", count, (), 3, paths=paths, labels=tf.fill([count], -1), folder=listing.root)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        broken = pool.map(source.is_broken, range(source.num_examples))
        return [source.describe(i) for i, is_broken in enumerate(broken) if is_broken]
