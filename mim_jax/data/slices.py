"""Slices of a folder, written as TFDS does: train[:90%], train[90%:], train[:1000], train[:10%]+train[90%:].

Where an image stands in its split is told by a hash of its path below the folder of the split, a share in [0, 1): whatever
is added or removed, the others stay in their slices. Percent cut that range, so that 10% of few images may be none or several;
numbers count the images in the order of their shares.
"""

import bisect
import hashlib
import re

from mim_jax.data.augment import DataError

PIECE = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def parse(split: str) -> list[tuple[str, str, str]]:
    """ "train[:90%]" -> [("train", "", "90%")]. Raises DataError for what is no split or slice."""
    pieces = [PIECE.fullmatch(piece.strip()) for piece in split.split("+")]
    if not all(pieces):
        words = "'train', 'train[:90%]', 'train[90%:]' or 'train[:1000]', added by +"
        raise DataError(f"{split!r} is no split nor a slice of one: write {words}.")
    return [(name, low or "", high or "") for name, low, high in (piece.groups() for piece in pieces)]


def share(path: bytes) -> float:
    """Path below the folder of a split -> where it stands: its blake2b of 8 bytes, big-endian, over 2^64."""
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big") / 2**64


def cut(paths: list[bytes], low: str, high: str, bounds=(0.0, 1.0)) -> list[bytes]:
    """The paths from `low` to `high` ("": the end), of those whose share lies within `bounds`; their order stays."""
    if not low and not high and bounds == (0.0, 1.0):
        return paths
    shares = {path: share(path) for path in paths}
    paths = [path for path in paths if bounds[0] <= shares[path] < bounds[1]]
    order = sorted(shares[path] for path in paths)
    first, last = _place(low or "0", order), _place(high or "100%", order)
    if (first, last) == (0, len(order)):
        return paths
    inside = order[first:last]
    return [path for path in paths if inside and inside[0] <= shares[path] <= inside[-1]]


def _place(limit: str, order: list[float]) -> int:
    """How many of the sorted shares lie before a limit."""
    number = int(limit.rstrip("%"))
    if limit.endswith("%"):
        number = number + 100 if limit.startswith("-") else number
        return bisect.bisect_left(order, number / 100)
    return min(max(number + len(order) if limit.startswith("-") else number, 0), len(order))
