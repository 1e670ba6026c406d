"""What lies in a folder of images: names as bytes, every folder entered once, and what is no image counted."""

import bisect
import collections
import dataclasses
import heapq
import os

from absl import logging

from mim_jax.data.augment import DataError

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


@dataclasses.dataclass(eq=False)
class Listing:
    """Paths are relative to `root`, with `/`. `folders`: every folder entered, with the time of its last change."""

    root: bytes
    files: list[bytes] = dataclasses.field(default_factory=list)  # the images, sorted by `by_parts`
    folders: dict[bytes, int] = dataclasses.field(default_factory=dict)
    others: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (folder, what) -> how many
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # hidden and housekeeping, by name
    again: dict[bytes, bytes] = dataclasses.field(default_factory=dict)  # a folder that was not entered -> where it was

    def below(self, folder: bytes) -> list[bytes]:
        """The images below a folder, b"" for all. A link to a folder outside it has the images of that one."""
        if not folder:
            return self.files
        found = self.files[slice(*self._range(folder))]
        for link, first in self.again.items():
            if (link == folder or link.startswith(folder + b"/")) and not (first + b"/").startswith(folder + b"/"):
                if not (link + b"/").startswith(first + b"/"):  # no loop
                    found = found + [link + f[len(first) :] for f in self.files[slice(*self._range(first))]]
        return sorted(found, key=by_parts) if self.again else found

    def _range(self, folder):
        return [bisect.bisect_left(self.files, by_parts(folder) + end, key=by_parts) for end in (b"\0", b"\1")]

    def inside(self, folder: bytes) -> list[bytes]:
        """The names of the folders in a folder, sorted."""
        every = (*self.folders, *self.again)
        return sorted(os.path.basename(place) for place in every if place and os.path.dirname(place) == folder)

    def what(self, folder: bytes) -> str:
        """The files below a folder that are no images, by kind."""
        kinds = collections.Counter()
        for (place, kind), n in self.others.items():
            if not folder or (place + b"/").startswith(folder + b"/"):
                kinds[kind] += n
        return few(f"{n} {kind}" for kind, n in kinds.most_common())

    def unchanged(self) -> bool:
        """Whether no folder has gained or lost a name since."""
        try:
            return all(os.stat(os.path.join(self.root, f)).st_mtime_ns == time for f, time in self.folders.items())
        except OSError:
            return False

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


_listings: dict[bytes, Listing] = {}


def listed(path: str) -> Listing:
    """The listing of a folder; made once by a process, and anew when a folder in it has changed. Says what is not read.

    Raises DataError for a folder that cannot be read.
    """
    root = os.fsencode(path)
    there = _listings.get(root)
    if there is None or not there.unchanged():
        _listings[root] = there = _walk(root)
        there.say()
    return there


def _walk(root: bytes) -> Listing:
    """Places come before links to them, so that an image is called by where it lies."""
    found, seen = Listing(root), {}
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
            found.folders[folder] = state.st_mtime_ns
            with os.scandir(path) as entries:
                for entry in entries:
                    _sort_in(entry, folder, found, folders, links)
        except OSError as error:
            raise DataError(f"The folder {shown(path)!r} cannot be read: {error.strerror}.") from error
    found.files.sort(key=by_parts)
    found.again = dict(sorted(found.again.items()))
    return found


def _identity(place):
    state = os.stat(place)
    return state.st_dev, state.st_ino


def _sort_in(entry, folder, found, folders, links):
    name = entry.name
    if name.startswith(b".") or name.lower() in HOUSEKEEPING:
        found.skipped[b"a hidden name" if name.startswith(b".") else name] += 1
        return
    path = folder + b"/" + name if folder else name
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    if is_folder:
        heapq.heappush(links, path) if entry.is_symlink() else folders.append(path)
        return
    extension = os.path.splitext(name)[1].lower()
    if is_file and extension in EXTENSIONS:
        found.files.append(path)
    elif is_file:
        found.others[folder, shown(extension) or "without an ending"] += 1
    else:
        found.others[folder, "broken links" if entry.is_symlink() else "that are no files"] += 1
