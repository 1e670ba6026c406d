"""Listing a folder of images: every folder is entered once, and what was found is kept for the next start.

A kept list is good while every folder has the time and inode it had, which a name that comes or goes changes, and a sample of
the images the sizes and times they had. It lies in `.mim_jax` in the folder, which may be deleted at any time.
"""

import bisect
import collections
import heapq
import itertools
import json
import operator
import os
import time

import numpy as np
from absl import logging

from mim_jax.data import kept
from mim_jax.data.augment import DataError
from mim_jax.data.listing import EXTENSIONS, HOUSEKEEPING, Images, Listing, by_parts, shown
from mim_jax.data.packed_names import Packed
from mim_jax.data.shards import each
from mim_jax.data.source import evenly
from mim_jax.paths import expanded

OWN = b".mim_jax"  # the folder of what is kept
LEAST = 10_000  # images for which it is worth it
SAMPLE = 1000  # images at most that are looked at before a kept list is trusted
TICK = 2 * 10**9  # ns: a folder that changed so shortly before it was read may change again with the same time
VERSION = json.dumps(["folder", 1])
_listings: dict[bytes, Listing] = {}


def listed(path: str) -> Listing:
    """The listing of a folder; made once by a process, and anew when a folder in it has changed. Says what is not read.

    Raises DataError for a folder that cannot be read.
    """
    root = os.fsencode(path)
    there = _listings.get(root)
    if there is None or not _unchanged(there):
        _listings[root] = there = _kept(root) or _anew(root)
        there.say()
    return there


def _state(path):
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino % 2**63


def _unchanged(listing) -> bool:
    """Whether no folder has gained or lost a name since."""
    folders = [os.path.join(listing.root, folder) for folder in listing.folders]
    some = [folders[k : k + 256] for k in range(0, len(folders), 256)]
    states = itertools.chain(*each(lambda paths: [*map(_state, paths)], some))
    return all(map(operator.eq, states, listing.folders.values()))


# ---- what is kept


def _places(root):
    """Where a list may be kept: beside the images; if that cannot be written, in the user's cache."""
    name = f"list_{kept.digest(os.path.realpath(os.fsdecode(root)))}.npz"
    return expanded(os.fsdecode(root)) / os.fsdecode(OWN) / "list.npz", kept.cached(name)


def _sample(listing):
    """Size and time of some images, spread evenly; -1 for one that is not there."""

    def row(path):
        try:
            state = os.stat(os.path.join(listing.root, path))
        except OSError:
            return -1, -1
        return state.st_size, state.st_mtime_ns

    files = listing.images.files
    return np.array(each(row, [files[k] for k in evenly(len(files), SAMPLE).tolist()]), np.int64).reshape(-1, 2)


def _kept(root) -> Listing | None:
    held = kept.load(_places(root), VERSION, f"list of {shown(root)}")
    if held is None:
        return None
    rest = json.loads(held["rest"].tobytes().decode("latin-1"))
    back = lambda text: text.encode("latin-1")
    names = held["folders"].tobytes().split(b"\0")[:-1]
    images = Images(Packed.loaded(held), [(names[k], place) for k, place in held["runs"].tolist()])
    listing = Listing(
        root,
        images,
        dict(zip(names, map(tuple, held["states"].tolist()))),
        others=collections.Counter({(back(folder), kind): n for folder, kind, n in rest["others"]}),
        skipped=collections.Counter({back(name): n for name, n in rest["skipped"]}),
        again={back(link): back(first) for link, first in rest["again"]},
    )
    if not _unchanged(listing) or not np.array_equal(_sample(listing), held["sample"]):
        logging.info("%s has changed since it was listed, and is listed anew", shown(root))
        return None
    return listing


def _keep(listing, started):
    """Writes down a listing whose walk began at `started`, ns since 1970."""
    what, root = f"list of {shown(listing.root)}", listing.root
    if any(changed > started - TICK or not changed for changed, _ in listing.folders.values()):
        logging.info("%s: a folder has just changed, or has no time: not kept now", what)
        return
    own = os.path.join(root, OWN)
    try:
        if not os.path.isdir(own) and _state(root) == listing.folders[b""]:
            os.mkdir(own)
            listing.folders[b""] = _state(root)  # which that has changed
    except OSError:
        pass  # there is the cache
    number = {folder: k for k, folder in enumerate(listing.folders)}
    text = lambda name: name.decode("latin-1")
    rest = dict(
        others=[(text(folder), kind, n) for (folder, kind), n in listing.others.items()],
        skipped=[(text(name), n) for name, n in listing.skipped.items()],
        again=[(text(link), text(first)) for link, first in listing.again.items()],
    )
    arrays = listing.images.files.arrays() | dict(
        folders=np.frombuffer(b"".join(folder + b"\0" for folder in listing.folders), np.uint8),
        states=np.array([*listing.folders.values()], np.int64),
        runs=np.array([(number[folder], place) for folder, place in listing.images.runs], np.int64).reshape(-1, 2),
        sample=_sample(listing),
        rest=np.frombuffer(json.dumps(rest).encode("latin-1"), np.uint8),
    )
    kept.save(_places(root)[0 if os.path.isdir(own) else 1 :], VERSION, what, arrays)


# ---- walking


def _anew(root) -> Listing:
    started = time.time_ns()
    listing = _walk(root)
    if len(listing.images) >= LEAST:
        _keep(listing, started)
    return listing


def _walk(root: bytes) -> Listing:
    """Places come before links to them, so that an image is called by where it lies."""
    found, seen, stretches = Listing(root, Images.of(()), {}), {}, []
    place = os.path.realpath(root)
    while place != (place := os.path.dirname(place)):
        seen[_identity(place)] = b".."
    folders, links = [b""], []
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        path = os.path.join(root, folder) if folder else root
        try:
            state = os.stat(path)
            key = state.st_dev, state.st_ino
            if key in seen:
                found.again[folder] = seen[key]
                continue
            seen[key] = folder
            found.folders[folder] = state.st_mtime_ns, state.st_ino % 2**63
            images, inner = [], []
            with os.scandir(path) as entries:
                for entry in entries:
                    _sort_in(entry, folder, found, images, inner)
        except OSError as error:
            raise DataError(f"The folder {shown(path)!r} cannot be read: {error.strerror}.") from error
        for name, is_link in inner:
            below = folder + b"/" + name if folder else name
            heapq.heappush(links, below) if is_link else folders.append(below)
        stretches += _stretches(folder, sorted(images), sorted(name for name, _ in inner))
    found.images = _joined(stretches)
    found.again = dict(sorted(found.again.items()))
    return found


def _identity(place):
    state = os.stat(place)
    return state.st_dev, state.st_ino


def _sort_in(entry, folder, found, images, inner):
    name = entry.name
    if name.startswith(b".") or name.lower() in HOUSEKEEPING:
        if name != OWN:
            found.skipped[b"a hidden name" if name.startswith(b".") else name] += 1
        return
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    if is_folder:
        inner.append((name, entry.is_symlink()))
        return
    extension = os.path.splitext(name)[1].lower()
    if is_file and extension in EXTENSIONS:
        images.append(name)
    elif is_file:
        found.others[folder, shown(extension) or "without an ending"] += 1
    else:
        found.others[folder, "broken links" if entry.is_symlink() else "that are no files"] += 1


def _stretches(folder, images, inner):
    """Sorted names of the images and the folders in a folder -> [(folder, names, each followed by a zero byte)], parted where
    the images of an inner folder come between."""
    cuts = [0, *sorted({bisect.bisect_left(images, name) for name in inner}), len(images)]
    return [(folder, b"\0".join(images[a:b]) + b"\0") for a, b in zip(cuts, cuts[1:]) if a < b]


def _joined(stretches) -> Images:
    """Images of all of them, in the order of their parts."""
    path = lambda folder, name: folder + b"/" + name if folder else name
    stretches.sort(key=lambda stretch: by_parts(path(stretch[0], stretch[1].partition(b"\0")[0])))
    runs, place = [], 0
    for folder, names in stretches:
        if not runs or runs[-1][0] != folder:
            runs.append((folder, place))
        place += names.count(b"\0")
    every = (path(folder, name) for folder, names in stretches for name in names[:-1].split(b"\0"))
    return Images(Packed.of(every), runs)
