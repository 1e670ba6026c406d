"""How the arrays of released parameters lie in memory <-> how this project's do. All are linear, and have inverses."""

import functools

import numpy as np
from einops import EinopsError, rearrange

RGB = 3  # channels of every released model with a pixel shuffle
SHUFFLE, PAIRS = dict(c=RGB), dict(x=2, y=2)

# layout: (released -> ours, sizes of its axes, what the importer's table says of it). A merging's `(x y d)` are 2x2
# neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1), each (row, column); a pixel shuffle's `(c u)` are pixels of a patch.
LAYOUTS = {
    "same": ("... -> ...", {}, ""),
    "squeeze": ("1 ... -> ...", {}, "leading axis dropped"),
    "linear": ("o ... -> ... o", {}, "transposed"),
    "conv1": ("o i 1 1 -> i o", {}, "1x1 convolution as a linear layer"),
    "conv": ("d c p q -> p q c d", {}, ""),
    "patch": ("d c p q -> (p q c) d", {}, "(c p q) -> (p q c)"),
    "flat": ("o (c y x) -> (y x c) o", dict(y=7, x=7), "transposed, (c y x) -> (y x c)"),
    "deconv": ("i o y x -> i (y x o)", PAIRS, "2x2 transposed convolution as a linear layer"),
    "shuffle": ("(c u) ... -> (u c) ...", SHUFFLE, "(c u u) -> (u u c)"),
    "shuffle_linear": ("(c u) i 1 1 -> i (u c)", SHUFFLE, "transposed, (c u u) -> (u u c)"),
    "merge": ("(y x d) ... -> (x y d) ...", PAIRS, "2x2 neighbours in the standard order"),
    "merge_linear": ("o (y x d) -> (x y d) o", PAIRS, "transposed, 2x2 neighbours in the standard order"),
}


def to_ours(array, layout: str):
    """A released array in this project's layout. Raises ValueError for one that cannot have the layout."""
    pattern, sizes, _ = LAYOUTS[layout]
    try:
        return rearrange(array, pattern, **sizes)
    except EinopsError as error:
        raise ValueError(str(error)) from error


def to_released(array, layout: str, patch: int = 0):
    """The inverse of `to_ours`; "patch" needs the patch size."""
    pattern, sizes, _ = LAYOUTS[layout]
    there, here = pattern.split(" -> ")
    return rearrange(array, f"{here} -> {there}", **dict(p=patch, q=patch) if layout == "patch" else sizes)


@functools.cache
def our_shape(shape: tuple, layout: str) -> tuple:
    """The shape that `to_ours` makes of a released shape. Raises ValueError for one that cannot have the layout."""
    return to_ours(np.broadcast_to(np.False_, shape), layout).shape


@functools.cache
def released_shape(shape: tuple, layout: str, patch: int = 0) -> tuple:
    """The shape that `to_released` makes of one of ours."""
    return to_released(np.broadcast_to(np.False_, shape), layout, patch).shape
