"""Images to patches and back, windows of patches, visible tokens. The patch vector's order is (row, column, channel)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from mim_jax.config import ConfigError


def grid_size(image_size, patch: int) -> tuple[int, int]:
    """(h, w) pixels -> (rows, columns) of patches. Raises ConfigError when the patch does not divide the image."""
    h, w = image_size
    if h % patch or w % patch:
        raise ConfigError(f"image size {h}x{w} is not divisible by the patch size {patch}")
    return h // patch, w // patch


def patchify(images, patch: int):
    """[b h w c] -> [b rows columns (p p c)]."""
    return rearrange(images, "b (r p) (s q) c -> b r s (p q c)", p=patch, q=patch)


def unpatchify(patches, patch: int):
    """[b rows columns (p p c)] -> [b h w c]."""
    return rearrange(patches, "b r s (p q c) -> b (r p) (s q) c", p=patch, q=patch)


def padded(maps, multiple: int):
    """[b h w d] -> the same with zeros to the right and below, sides multiples of `multiple`."""
    rows, columns = (-side % multiple for side in maps.shape[1:3])
    return jnp.pad(maps, ((0, 0), (0, rows), (0, columns), (0, 0))) if rows or columns else maps


def to_cells(hidden, scale: float):
    """[b y x] -> [b scale*y scale*x]: repeated, or, as a share, averaged (LocalMIM: a fractional weight)."""
    if scale >= 1:
        return jnp.repeat(jnp.repeat(hidden, round(scale), 1), round(scale), 2)
    side = round(1 / scale)
    return reduce(hidden, "b (y i) (x j) -> b y x", "mean", i=side, j=side)


def cut_windows(tokens, corners, window: int):
    """[b rows columns d], [b m 2] -> [b m n d], n = window^2: the tokens of each image's windows, row by row."""

    def cut(grid, corner):
        return jax.lax.dynamic_slice(grid, (corner[0], corner[1], 0), (window, window, grid.shape[-1]))

    windows = jax.vmap(jax.vmap(cut, (None, 0)))(tokens, corners)
    return rearrange(windows, "b m r s d -> b m (r s) d")


class Visible(NamedTuple):
    """Which tokens of n are visible. ids: [b k], ascending; slot: [b n], the place of each among the visible ones
    (of no meaning where hidden); hidden: [b n] bool."""

    ids: jax.Array
    slot: jax.Array
    hidden: jax.Array


def visible(hidden, kept: int) -> Visible:
    """[b n] bool, with `kept` visible tokens in every row, a static number."""
    ids = jnp.argsort(hidden, axis=-1, stable=True)[:, :kept]
    return Visible(ids, jnp.maximum(jnp.cumsum(~hidden, -1) - 1, 0), hidden)


@jax.custom_vjp
def keep(tokens, which: Visible):
    """[b n ...] -> [b k ...]: the visible tokens."""
    return take_rows(tokens, which.ids)


@jax.custom_vjp
def spread(tokens, which: Visible):
    """[b k ...] -> [b n ...]: visible tokens back to their places, zeros where hidden."""
    hidden = which.hidden.reshape(which.hidden.shape + (1,) * (tokens.ndim - 2))
    return jnp.where(hidden, 0, take_rows(tokens, which.slot))


# Each is the transpose of the other. Left to itself, JAX would transpose a gather to a scatter-add, which is slow on a
# CPU and, with repeated indices, adds up in any order on a GPU.
keep.defvjp(lambda tokens, which: (keep(tokens, which), which), lambda which, g: (spread(g, which), None))
spread.defvjp(lambda tokens, which: (spread(tokens, which), which), lambda which, g: (keep(g, which), None))


def take_rows(tokens, ids):
    """[b n ...], [b k] -> [b k ...]."""
    return jnp.take_along_axis(tokens, ids.reshape(ids.shape + (1,) * (tokens.ndim - 2)), axis=1)
