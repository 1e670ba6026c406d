"""Tables that released files carry and this project computes: compared with ours when read, and written again."""

import math
import re

import numpy as np

from mim_jax.models.posembed import sincos_table
from mim_jax.models.window_attention import WindowLayout

SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)  # its transpose is the second filter
CLOSE = 1e-4  # torch computes some of these tables in float32


def grid_of(tokens: int, size) -> tuple[tuple[int, int], bool] | None:
    """-> (rows, columns) of this many tokens of an image of `size` (height, width), and whether one of them is a cls token."""
    for cls in (False, True):
        n = tokens - cls
        rows = round(math.sqrt(n * size[0] / size[1]))
        if rows and n and n % rows == 0 and rows * size[1] == n // rows * size[0]:
            return (rows, n // rows), cls
    return None


def is_sincos(array, size) -> bool:
    """[1 (1+)n d]: whether it is the sin-cos table of an image of `size`."""
    found = grid_of(array.shape[1], size) if array.ndim == 3 else None
    if found is None or array.shape[-1] % 4:
        return False
    return np.allclose(array[0], sincos_table(array.shape[-1], *found), rtol=0, atol=CLOSE)


def is_sobel(array, size) -> bool:
    """[2 1 3 3]: HOG's filters."""
    return array.shape == (2, 1, 3, 3) and np.array_equal(array[:, 0], np.stack([SOBEL, SOBEL.T]))


def offset_index(window, cls: bool) -> np.ndarray:
    """-> [n n]: the row of a table of relative positions (models/relative_bias.py) for every pair (query, key)."""
    r, c = window
    place = np.stack(np.meshgrid(np.arange(r), np.arange(c), indexing="ij"), -1).reshape(-1, 2)
    offset = place[:, None] - place[None] + [r - 1, c - 1]
    index = offset[..., 0] * (2 * c - 1) + offset[..., 1]
    if cls:
        count = (2 * r - 1) * (2 * c - 1)
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def is_offset_index(array, size) -> bool:
    """[n n] int, of a square window or of the whole image: whether it is `offset_index`."""
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        return False
    side = math.isqrt(array.shape[0])
    found = ((side, side), False) if side * side == array.shape[0] else grid_of(array.shape[0], size)
    return found is not None and np.array_equal(array, offset_index(*found))


def is_window_mask(array, size) -> bool:
    """[m n n]: not 0 for pairs in a rolled window that the image's border keeps apart."""
    if array.ndim != 3:
        return False
    found, side = grid_of(array.shape[0] * array.shape[1], size), math.isqrt(array.shape[1])
    if found is None or found[1] or side < 2:
        return False
    apart = WindowLayout.of(found[0], 1, side, shifted=True).apart()
    return apart is not None and np.array_equal(array != 0, apart)


FIXED = (  # released name, test, what it is
    (r"(^|\.)(decoder_)?pos_embed$", is_sincos, "the fixed sin-cos table"),
    (r"^hog_enc\.\d+\.conv\.weight$", is_sobel, "the Sobel filters"),
    (r"\.relative_position_index$", is_offset_index, "the offsets of pairs"),
    (r"\.attn_mask$", is_window_mask, "the pairs apart in rolled windows"),
)


def explain(name: str, array, size) -> tuple[str, bool] | None:
    """-> (what this tensor is called here, whether its values are ours), or None for a tensor that is no fixed table."""
    for pattern, test, words in FIXED:
        if re.search(pattern, name):
            return words, bool(test(np.asarray(array), size))
    return None


# -- written again ----------------------------------------------------------------------------------------------------


def tables(config, released) -> dict[str, np.ndarray]:
    """What the released pretraining code keeps beside its parameters, of which `released` are the names -> {name: array}."""
    e, method = config.encoder, config[config.method]
    grid = tuple(side // e.patch for side in config.image_size)
    table = lambda width, side, cls: sincos_table(width, side, cls)[None]
    found = {}
    if config.method == "lomar" or e.get("position") == "absolute":
        found["pos_embed"] = table(e.width, grid, True)
    if config.method == "mae":
        side = grid if "depths" not in e else tuple(n >> (len(e.depths) - 1) for n in grid)
        found["decoder_pos_embed"] = table(method.decoder_width, side, "depths" not in e)
    if config.method == "localmim":
        for j, (tap, width, target) in enumerate(zip(method.taps, method.decoder_width, method.target)):
            fewer = min(tap + 1, len(e.depths) - 1) if "depths" in e else 0
            found[f"decoder.{j}.pos_embed"] = table(width, tuple(n >> fewer for n in grid), "depths" not in e)
            if target == "hog":
                found[f"hog_enc.{j}.conv.weight"] = np.stack([SOBEL, SOBEL.T])[:, None]
    for name in released:
        if name.endswith("relative_position_bias_table"):
            stage = re.search(r"layers\.(\d+)\.", name)
            window = tuple(min(e.window, n >> int(stage[1])) for n in grid) if stage else grid
            found[name.replace("bias_table", "index")] = offset_index(window, cls=not stage)
    return found
