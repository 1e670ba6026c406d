"""LoMaR's hiding: small random windows of the patch grid, and random patches hidden inside each.

Source: arXiv 2206.00790, section 3. Where the paper and the released code pair images with windows differently, both are
here: `paper_corners` and `released_corners`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.config import ConfigError


class WindowMask(NamedTuple):
    """corners: [b m 2] int32, row and column of each window's first patch; hidden: [b m n] bool, True = hidden."""

    corners: jax.Array
    hidden: jax.Array


def hidden_count(window: int, mask_ratio: float) -> int:
    """int(window^2 * mask_ratio), truncated in floating point as the released code does."""
    return int(window * window * mask_ratio)


def check(grid, window: int, count: int, mask_ratio: float, pairing: str):
    """Raises ConfigError for windows that the grid cannot hold or a mask that hides nothing or everything."""
    rows, columns = grid
    if not 1 <= window <= min(rows, columns):
        raise ConfigError(f"window={window} does not fit the {rows}x{columns} grid of patches; use 1 to {min(grid)}")
    if not 0 <= mask_ratio <= 1:  # NaN included
        raise ConfigError(f"mask_ratio={mask_ratio} is not a share between 0 and 1")
    if not 1 <= hidden_count(window, mask_ratio) < window * window:
        raise ConfigError(
            f"mask_ratio={mask_ratio} hides {hidden_count(window, mask_ratio)} of the {window * window} patches of a "
            "window; at least one must be hidden and one visible"
        )
    positions = min(rows, columns) - window + 1
    if pairing == "released" and count > positions:
        raise ConfigError(
            f"pairing=released draws {count} windows with distinct rows and columns, but a {rows}x{columns} grid has "
            f"only {positions} positions for window={window}; use fewer (lomar.views) or pairing=paper"
        )


def draw(key, batch_size: int, grid, *, window: int, count: int, mask_ratio: float, pairing: str = "paper") -> WindowMask:
    """Draws the windows of a batch and what is hidden in them. Static shapes; one global key, any number of devices."""
    corner_key, hide_key = jax.random.split(key)
    corners = (paper_corners if pairing == "paper" else released_corners)(corner_key, batch_size, grid, window, count)
    noise = jax.random.uniform(hide_key, (batch_size, count, window * window))
    return WindowMask(corners, hide_smallest(noise, hidden_count(window, mask_ratio)))


def hide_smallest(noise, count: int):
    """[... n] -> [... n] bool: True at the `count` smallest values."""
    return jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < count


def paper_corners(key, batch_size: int, grid, window: int, count: int):
    """-> [b m 2]: every image gets its own windows, uniform over the positions inside the grid."""
    last = jnp.array([grid[0] - window + 1, grid[1] - window + 1])
    return jax.random.randint(key, (batch_size, count, 2), 0, last)


def released_corners(key, batch_size: int, grid, window: int, count: int):
    """-> [b m 2]: one draw per batch, distinct rows and distinct columns, paired as the released code does."""
    row_key, column_key = jax.random.split(key)
    rows = jax.random.permutation(row_key, grid[0] - window + 1)[:count]
    columns = jax.random.permutation(column_key, grid[1] - window + 1)[:count]
    return pair_as_released(jnp.stack([rows, columns], -1), batch_size)


def pair_as_released(corners, batch_size: int):
    """[m 2] -> [b m 2]: window v of image i is output row v*b + i, which gets window (v*b + i) mod m.

    With b divisible by m every image sees one window m times, under m different masks.
    """
    count = corners.shape[0]
    row = jnp.arange(count)[None, :] * batch_size + jnp.arange(batch_size)[:, None]
    return corners[row % count]
