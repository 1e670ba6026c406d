"""Slices of a folder, written as TFDS does: train[:90%], train[90%:], train[:1000], train[:10%]+train[90%:].

Where an image stands in its split is told by a hash of its path below the folder of the split, a share in [0, 1): whatever
is added or removed, the others stay in their slices. Percent cut that range, so that 10% of few images may be none or several;
numbers count the images in the order of their shares.
"""

import hashlib
import re

import numpy as np

from mim_jax.data.augment import DataError
from mim_jax.data.packed_names import Names

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


def cut(names: Names, low: str, high: str, bounds=(0.0, 1.0)) -> np.ndarray | slice:
    """-> the places of those from `low` to `high` ("": the end) of the names whose share lies within `bounds`, int64 [m]; all
    of them as a slice."""
    if not low and not high and bounds == (0.0, 1.0):
        return slice(None)
    from mim_jax.data import name_hashes  # here, for numba and what it compiles take 100 MB

    shares = name_hashes.hashes(names.pieces(), len(names)).astype(np.float64) / 2**64
    inside = (bounds[0] <= shares) & (shares < bounds[1])
    places, shares = np.flatnonzero(inside), shares[inside]
    order = np.sort(shares)
    first, last = _place(low or "0", order), _place(high or "100%", order)
    if first >= last:
        return places[:0]
    return places[(order[first] <= shares) & (shares <= order[last - 1])]


def _place(limit: str, order: np.ndarray) -> int:
    """How many of the sorted shares lie before a limit."""
    number = int(limit.rstrip("%"))
    if limit.endswith("%"):
        number = number + 100 if limit.startswith("-") else number
        return int(np.searchsorted(order, number / 100))
    return min(max(number + len(order) if limit.startswith("-") else number, 0), len(order))
