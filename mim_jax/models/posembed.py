"""Fixed sin-cos position tables (MAE), as constants, and the bicubic resizing of learned ones."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.config import ConfigError


def sincos_table(width: int, grid, cls: bool = False) -> np.ndarray:
    """-> [n d] float32, n = rows*columns (+1 zero row first for the cls token).

    The first half of the width encodes the column, the second the row; each half is [sin | cos] of position times
    10000^(-i / (d/4)) (MAE, arXiv 2111.06377, released code).
    """
    if width % 4:
        raise ConfigError(f"a sin-cos position table needs a width (of encoder or decoder) divisible by 4, not {width}")
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")

    def half(position):
        angle = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    table = np.concatenate([half(column), half(row)], 1)
    if cls:
        table = np.concatenate([np.zeros((1, width)), table])
    return table.astype(np.float32)


def resize_table(table, old_grid, new_grid, cls: bool):
    """[1 (1+)n d] -> [1 (1+)n' d]: bicubic with a = -0.75 and half-pixel centres, as torch does; a cls row is kept."""
    head, body = (table[:, :1], table[:, 1:]) if cls else (table[:, :0], table)
    body = jnp.asarray(body).reshape(old_grid[0], old_grid[1], -1)
    rows, columns = map(cubic_matrix, old_grid, new_grid)
    body = jnp.einsum("ir,js,rsd->ijd", rows, columns, body, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.asarray(head), body.reshape(1, -1, body.shape[-1])], 1)


def cubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """-> [new old]: weights of cubic convolution with clamped borders (jax.image's cubic has a = -0.5)."""
    x = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(x).astype(int)
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        t = np.abs(x - (base + offset))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(base + offset, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
