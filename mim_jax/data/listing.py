"""What lies in a folder of images: names as bytes, and what is no image counted. `walk.listed` finds it out."""

import bisect
import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable

import numpy as np
from absl import logging

from mim_jax.data.packed_names import Packed

# What `augment.decode` reads as PIL does (tests/test_folders.py compares every one); the content decides, not the name.
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .avif".split()
)
# Of file managers, NAS and disks, in lower case; whatever begins with a dot is left out too.
HOUSEKEEPING = frozenset(
    (b"@eadir", b"@recycle", b"#recycle", b"#snapshot", b"@recently-snapshot", b"__macosx", b"__pycache__", b"lost+found",
     b"$recycle.bin", b"system volume information", b"thumbs.db", b"ehthumbs.db", b"desktop.ini")
)  # fmt: skip
FEW = 5


def shown(name: bytes) -> str:
    r"""A name in text; bytes that are not UTF-8 as \xNN."""
    return name.decode("utf-8", "backslashreplace")


def few(names, count: int = FEW) -> str:
    """The first of some names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def by_parts(path: bytes) -> bytes:
    """Sorts paths as the lists of their parts: the files of a folder stand together."""
    return path.replace(b"/", b"\0")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images, sorted by `by_parts`, so that all below a folder stand together.

    runs: (folder, place of the first) of those that stand together in a folder itself; everything is counted with these, for
    there are a thousand times fewer.
    """

    files: Packed  # paths
    runs: list[tuple[bytes, int]]

    @classmethod
    def of(cls, paths: Iterable[bytes]) -> "Images":
        """Sorted paths -> Images."""
        runs = []

        def noted():
            for place, path in enumerate(paths):
                if not runs or runs[-1][0] != os.path.dirname(path):
                    runs.append((os.path.dirname(path), place))
                yield path

        return cls(Packed.of(noted()), runs)

    def __len__(self):
        return len(self.files)

    def counted(self) -> list[tuple[bytes, int]]:
        """Of every run its folder and how many images it has."""
        ends = [place for _, place in self.runs[1:]] + [len(self)]
        return [(folder, end - place) for (folder, place), end in zip(self.runs, ends)]

    @functools.cached_property
    def _spans(self):
        """{folder: (first, behind the last)} of all folders that have images, at any depth."""
        spans, place = {}, 0
        for folder, count in self.counted():
            while True:
                spans[folder] = spans.get(folder, (place,))[0], place + count
                if not folder:
                    break
                folder = os.path.dirname(folder)
            place += count
        return spans

    def below(self, folder: bytes) -> "Images":
        """The images below a folder, b"" for all."""
        low, high = self._spans.get(folder, (0, 0))
        first, last = (bisect.bisect_left(self.runs, place, key=lambda run: run[1]) for place in (low, high))
        return Images(self.files[low:high], [(inner, place - low) for inner, place in self.runs[first:last]])

    def first_folders(self, root: bytes):
        """-> the names of the first-level folders in `root` that have images, b"" for itself; of every run, int64, which of
        them, and how many images it has."""
        names, counted = {}, self.counted()
        start = len(root) + 1 if root else 0
        which = [names.setdefault(folder[start:].partition(b"/")[0], len(names)) for folder, _ in counted]
        return list(names), np.array(which, np.int64), np.array([count for _, count in counted], np.int64)


@dataclasses.dataclass(eq=False)
class Listing:
    """Paths are relative to `root`, with `/`. `folders`: every folder entered, with the time of its last change and inode."""

    root: bytes
    images: Images
    folders: dict[bytes, tuple[int, int]]
    others: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (folder, what) -> how many
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # hidden and housekeeping, by name
    again: dict[bytes, bytes] = dataclasses.field(default_factory=dict)  # a folder that was not entered -> where it was

    def below(self, folder: bytes) -> Images:
        """The images below a folder, b"" for all. A link to a folder outside it has the images of that one."""
        found, linked = self.images.below(folder), []
        for link, first in self.again.items() if folder else ():
            if (link == folder or link.startswith(folder + b"/")) and not (first + b"/").startswith(folder + b"/"):
                if not (link + b"/").startswith(first + b"/"):  # no loop
                    linked += [link + path[len(first) :] for path in self.images.below(first).files]
        return Images.of(sorted(itertools.chain(found.files, linked), key=by_parts)) if linked else found

    def inside(self, folder: bytes) -> list[bytes]:
        """The names of the folders in a folder, sorted."""
        return self._inside.get(folder, [])

    @functools.cached_property
    def _inside(self):
        found = collections.defaultdict(list)
        for place in sorted({*self.folders, *self.again} - {b""}):
            found[os.path.dirname(place)].append(os.path.basename(place))
        return dict(found)

    def what(self, folder: bytes) -> str:
        """The files below a folder that are no images, by kind."""
        kinds = collections.Counter()
        for (place, kind), n in self.others.items():
            if not folder or (place + b"/").startswith(folder + b"/"):
                kinds[kind] += n
        return few(f"{n} {kind}" for kind, n in kinds.most_common())

    def say(self):
        """One line for each kind of thing that is not read."""
        place = shown(self.root)
        if self.others:
            logging.warning("%s: not read, for what they are: %s", place, self.what(b""))
        if self.skipped:
            words = few(f"{n} x {shown(name)}" for name, n in self.skipped.most_common())
            logging.warning("%s: hidden, or of a file manager, and left out: %s", place, words)
        if self.again:
            words = few(f"{shown(link)} is {shown(first) or 'the folder itself'}" for link, first in self.again.items())
            logging.warning(
                "%s: links to folders above, or read already, so that no split has an image twice: %s", place, words
            )
