"""Masks of objects as bits, and what a mask head is to predict of them."""

import jax
import jax.numpy as jnp

from mim_jax.boxes.roi_align import bins

CHUNK = 8  # masks that are unpacked at a time


def unpacked(bits, width: int):
    """uint8 [... ceil(width / 8)] as np.packbits(axis=-1) makes it -> uint8 [... width] of 0 and 1."""
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    found = (bits[..., None] >> shifts) & 1
    return found.reshape(*bits.shape[:-1], -1)[..., :width]


def cropped(bits, which, boxes, width: int, out: int):
    """uint8 [g h ceil(width / 8)], which mask int32 [r], boxes [r 4] in pixels -> bool [r out out]: the mask inside each box,
    by RoIAlign, where at least half of a bin is covered."""

    def one(x):
        index, (x0, y0, x1, y1) = x
        mask = unpacked(bits[index], width).astype(jnp.float32)
        rows, columns = bins(y0, y1, mask.shape[0], out), bins(x0, x1, width, out)
        exact = jax.lax.Precision.HIGHEST
        found = jnp.einsum("py,yx->px", rows, mask, precision=exact)
        return jnp.einsum("px,qx->pq", found, columns, precision=exact) >= 0.5

    return jax.lax.map(one, (which, boxes), batch_size=min(CHUNK, len(which)))
