"""Maps of another size: bilinear resizing and adaptive mean pooling as torch has them, as products with constant matrices."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """-> float64 [new old]: half-pixel centres, borders clamped, no antialiasing (torch's align_corners=False)."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
    base = np.minimum(place.astype(int), old - 1)
    share, row = place - base, np.arange(new)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (row, base), 1 - share)
    np.add.at(matrix, (row, np.minimum(base + 1, old - 1)), share)
    return matrix


def mean_matrix(old: int, bins: int) -> np.ndarray:
    """-> float64 [bins old]: means over floor(i old / bins) .. ceil((i + 1) old / bins), which may overlap."""
    matrix = np.zeros((bins, old))
    for i in range(bins):
        low, high = i * old // bins, -(-(i + 1) * old // bins)
        matrix[i, low:high] = 1 / (high - low)
    return matrix


def resized(maps, size: tuple[int, int]):
    """[b h w d] -> [b size d], bilinear."""
    return _both(maps, *map(bilinear_matrix, maps.shape[1:3], size)) if maps.shape[1:3] != tuple(size) else maps


def pooled(maps, bins: int):
    """[b h w d] -> [b bins bins d]: means over parts of the map."""
    return _both(maps, *(mean_matrix(side, bins) for side in maps.shape[1:3]))


def _both(maps, rows, columns):
    rows, columns = jnp.asarray(rows, maps.dtype), jnp.asarray(columns, maps.dtype)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("jx,bixd->bijd", columns, jnp.einsum("iy,byxd->bixd", rows, maps, precision=highest), precision=highest)
