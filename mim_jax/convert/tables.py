"""Tables that released files carry and this project computes: compared with ours when read, and written again."""

import math
import re

import numpy as np

from mim_jax.convert import names
from mim_jax.models.posembed import sincos_table
from mim_jax.models.relative_bias import offsets
from mim_jax.models.window_layout import WindowLayout
from mim_jax.tokens import grid_size

SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
SOBEL_FILTERS = np.stack([SOBEL, SOBEL.T])[:, None]  # [2 1 3 3], HOG's
CLOSE = 1e-4  # torch computes some of these tables in float32


def grid_of(tokens: int, size) -> tuple[tuple[int, int], bool] | None:
    """-> (rows, columns) of this many tokens of an image of `size` (height, width), and whether one of them is a cls token."""
    for cls in (False, True):
        n = tokens - cls
        rows = round(math.sqrt(n * size[0] / size[1]))
        if rows and n and n % rows == 0 and rows * size[1] == n // rows * size[0]:
            return (rows, n // rows), cls
    return None


def sincos(shape, size):
    """[1 (1+)n d]: the sin-cos table of an image of `size`."""
    found = grid_of(shape[1], size) if len(shape) == 3 and shape[-1] % 4 == 0 else None
    return found and sincos_table(shape[-1], *found)[None]


def offset_index(window, cls: bool) -> np.ndarray:
    """-> [n n]: the row of a table of relative positions (models/relative_bias.py) for every pair (query, key)."""
    r, c = window
    place = np.stack(np.meshgrid(np.arange(r), np.arange(c), indexing="ij"), -1).reshape(-1, 2)
    offset = place[:, None] - place[None] + [r - 1, c - 1]
    index = offset[..., 0] * (2 * c - 1) + offset[..., 1]
    if cls:
        count = offsets(window)
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def index_of(shape, size):
    """[n n]: `offset_index` of a square window or of the whole image."""
    if len(shape) != 2 or shape[0] != shape[1]:
        return None
    side = math.isqrt(shape[0])
    found = ((side, side), False) if side * side == shape[0] else grid_of(shape[0], size)
    return found and offset_index(*found)


def window_mask(shape, size):
    """[m n n]: whether the image's border keeps a pair apart in a rolled window."""
    if len(shape) != 3:
        return None
    found, side = grid_of(shape[0] * shape[1], size), math.isqrt(shape[1])
    return None if found is None or found[1] or side < 2 else WindowLayout.of(found[0], 1, side, shifted=True).apart()


FIXED = (  # released name, the table by (shape, size) or None for no such table, what it is
    (r"(^|\.)(decoder_)?pos_embed$", sincos, "the fixed sin-cos table"),
    (r"^hog_enc\.\d+\.conv\.weight$", lambda shape, size: SOBEL_FILTERS, "the Sobel filters"),
    (r"\.relative_position_index$", index_of, "the offsets of pairs"),
    (r"\.attn_mask$", window_mask, "the pairs apart in rolled windows"),
)


def explain(name: str, array, size) -> tuple[str, bool] | None:
    """-> (what this tensor is called here, whether its values are ours), or None for a tensor that is no fixed table."""
    for pattern, table_of, words in FIXED:
        if re.search(pattern, name):
            ours = table_of(array.shape, size)
            if ours is None or ours.shape != array.shape:
                return words, False
            theirs = np.asarray(array) != 0 if ours.dtype == bool else np.asarray(array)
            return words, np.allclose(theirs, ours, rtol=0, atol=CLOSE)
    return None


def tables(config, released) -> dict[str, np.ndarray]:
    """What the released pretraining code keeps beside its parameters, of which `released` are the names -> {name: array}."""
    e, method = config.encoder, config[config.method]
    grid, cls = grid_size(config.image_size, e.patch), e.kind == "vit"
    stages = 1 if cls else len(e.depths)
    level = lambda i: tuple(n >> min(i, stages - 1) for n in grid)
    table = lambda width, side: sincos_table(width, side, cls)[None]
    found = {}
    if cls and (config.method == "lomar" or e.position == "absolute"):
        found["pos_embed"] = table(e.width, grid)
    if config.method == "mae":
        found["decoder_pos_embed"] = table(method.decoder_width, level(stages - 1))
    if config.method == "localmim":
        widths, targets = (names.per_tap(method, key) for key in ("decoder_width", "target"))
        for j, (tap, width, target) in enumerate(zip(method.taps, widths, targets, strict=True)):
            found[f"decoder.{j}.pos_embed"] = table(width, level(tap + 1))
            if target == "hog":
                found[f"hog_enc.{j}.conv.weight"] = SOBEL_FILTERS
    for name in released:
        if name.endswith("relative_position_bias_table"):
            stage = re.search(r"layers\.(\d+)\.", name)
            window = tuple(min(e.window, n) for n in level(int(stage[1]))) if stage else grid
            found[name.replace("bias_table", "index")] = offset_index(window, cls)
    return found
