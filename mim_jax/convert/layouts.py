"""How the arrays of released parameters lie in memory <-> how this project's do. All are linear, and have inverses."""

import functools

import numpy as np

RGB = 3  # channels of every released model with a pixel shuffle


def to_ours(array, layout: str):
    """A released array in this project's layout."""
    return LAYOUTS[layout][0](array)


def to_released(array, layout: str, patch: int = 0):
    """The inverse of `to_ours`; "patch" needs the patch size."""
    back = LAYOUTS[layout][1]
    return back(array, patch) if layout == "patch" else back(array)


@functools.cache
def our_shape(shape: tuple, layout: str) -> tuple:
    """The shape that `to_ours` makes of a released shape. Raises ValueError, IndexError for one that cannot have the layout."""
    return to_ours(np.broadcast_to(np.False_, shape), layout).shape


@functools.cache
def released_shape(shape: tuple, layout: str, patch: int = 0) -> tuple:
    """The shape that `to_released` makes of one of ours."""
    return to_released(np.broadcast_to(np.False_, shape), layout, patch).shape


def transposed(array):
    """linear [out in] <-> [in out]."""
    return np.ascontiguousarray(array.T)


def patch_to_ours(array):
    """conv [d c p q] -> [(p q c) d]."""
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]))


def patch_to_released(array, patch: int):
    return np.ascontiguousarray(array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1))


def deconv_to_ours(array):
    """2x2 transposed convolution of stride 2, [in out 2 2] -> [in (2 2 out)]."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1).reshape(array.shape[0], -1))


def deconv_to_released(array):
    return np.ascontiguousarray(array.reshape(array.shape[0], 2, 2, -1).transpose(0, 3, 1, 2))


def swap_neighbours(array):
    """[(4 d) ...] with 2x2 neighbours (0,0),(0,1),(1,0),(1,1) <-> (0,0),(1,0),(0,1),(1,1), each (row, column)."""
    return array.reshape(4, -1, *array.shape[1:])[np.array([0, 2, 1, 3])].reshape(array.shape)


def shuffle_to_ours(array):
    """[(c u u) ...], a pixel shuffle's order, -> [(u u c) ...], the order of patches; RGB."""
    pixels = array.reshape(RGB, -1, *array.shape[1:])
    return np.ascontiguousarray(pixels.swapaxes(0, 1)).reshape(array.shape)


def shuffle_to_released(array):
    pixels = array.reshape(-1, RGB, *array.shape[1:])
    return np.ascontiguousarray(pixels.swapaxes(0, 1)).reshape(array.shape)


# layout: (released -> ours, ours -> released)
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "squeeze": (lambda x: x[0], lambda x: x[None]),
    "linear": (transposed, transposed),
    "conv1": (lambda x: transposed(x[:, :, 0, 0]), lambda x: transposed(x)[:, :, None, None]),
    "patch": (patch_to_ours, patch_to_released),
    "deconv": (deconv_to_ours, deconv_to_released),
    "shuffle": (shuffle_to_ours, shuffle_to_released),
    "shuffle_linear": (
        lambda x: transposed(shuffle_to_ours(x[:, :, 0, 0])),
        lambda x: shuffle_to_released(transposed(x))[:, :, None, None],
    ),
    "merge": (swap_neighbours, swap_neighbours),
    "merge_linear": (lambda x: swap_neighbours(transposed(x)), lambda x: transposed(swap_neighbours(x))),
}
WORDS = {  # what the importer's table says of a layout
    "same": "", "squeeze": "leading axis dropped", "linear": "transposed", "conv1": "1x1 convolution as a linear layer",
    "patch": "(c p q) -> (p q c)", "deconv": "2x2 transposed convolution as a linear layer", "shuffle": "(c u u) -> (u u c)",
    "shuffle_linear": "transposed, (c u u) -> (u u c)", "merge": "2x2 neighbours in the standard order",
    "merge_linear": "transposed, 2x2 neighbours in the standard order",
}  # fmt: skip
