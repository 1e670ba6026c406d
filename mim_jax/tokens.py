"""Images to patches and back, and windows of patches. The patch vector's order is (row, column, channel)."""

import jax
import jax.numpy as jnp
from einops import rearrange

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


def cut_windows(tokens, corners, window: int):
    """[b rows columns d], [b m 2] -> [b m n d], n = window^2: the tokens of each image's windows, row by row."""

    def cut(grid, corner):
        return jax.lax.dynamic_slice(grid, (corner[0], corner[1], 0), (window, window, grid.shape[-1]))

    windows = jax.vmap(jax.vmap(cut, (None, 0)))(tokens, corners)
    return rearrange(windows, "b m r s d -> b m (r s) d")


def take(tokens, ids):
    """[... n d], [... k] -> [... k d]: the tokens with these ids."""
    return jnp.take_along_axis(tokens, ids[..., None], axis=-2)
