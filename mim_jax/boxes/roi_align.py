"""RoIAlign (Mask R-CNN, arXiv 1703.06870), exact and as two matrix products: out = Ay F Ax^T.

A bin of a box is the mean over n x n points that are sampled bilinearly, n = ceil(side of the box / bins), each box and axis
its own. Both axes being independent, the mean factors into one matrix for rows and one for columns, whatever n is. Products
where gathers would do: their gradient adds up in a fixed order, and matrix units are fast.
"""

import jax
import jax.numpy as jnp

CANONICAL, LEVEL = 224, 4  # a box of this side in pixels belongs to the level of stride 2^4 (arXiv 1612.03144, equation 1)
CHUNK = 32  # boxes whose rows are in memory at a time


def levels(boxes, lowest: int, highest: int):
    """[... 4] -> int32 [...]: the level whose stride fits the size of the box, the lowest for one without area."""
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    level = jnp.floor(LEVEL + jnp.log2(jnp.sqrt(w * h) / CANONICAL + 1e-8))
    return jnp.clip(level, lowest, highest).astype(jnp.int32)


def bins(start, end, side: int, out: int, sampling: int = 0):
    """Edges [...] of boxes along one axis, in cells of a map of `side` cells -> [... out side] float32: the weights that
    cells have in each bin. `sampling`: points a bin, 0: as many as the length asks for.

    A point beyond -1 or `side` counts as 0; one at the border is moved onto the nearest cell.
    """
    start, end = start - 0.5, end - 0.5
    length = end - start
    most = sampling or -(-side // out) + 1
    n = jnp.float32(sampling) if sampling else jnp.minimum(jnp.ceil(length / out), most)
    n, point = jnp.broadcast_to(n, length.shape)[..., None, None], jnp.arange(most, dtype=jnp.float32)
    width = (length / out)[..., None, None]
    first = start[..., None, None] + jnp.arange(out, dtype=jnp.float32)[:, None] * width
    at = first + (point + 0.5) * width / jnp.maximum(n, 1)  # [... out points]
    counts = (point < n) & (at >= -1) & (at <= side)
    at = jnp.clip(at, 0, side - 1)
    share = jnp.where(counts, 1 / jnp.maximum(n, 1), 0)
    hat = jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(side, dtype=jnp.float32)))
    return (hat * share[..., None]).sum(-2)


def align(features, boxes, out: int, scale: float, sampling: int = 0):
    """[y x c], boxes [r 4] in pixels, cells per pixel -> [r out out c]; weights and sums are float32."""
    x0, y0, x1, y1 = jnp.moveaxis(boxes * scale, -1, 0)
    rows = bins(y0, y1, features.shape[0], out, sampling)
    columns = bins(x0, x1, features.shape[1], out, sampling)
    found = jnp.einsum("rpy,yxc->rpxc", rows, features, preferred_element_type=jnp.float32)
    found = jnp.einsum("rqx,rpxc->rpqc", columns, found, preferred_element_type=jnp.float32)
    return found.astype(features.dtype)


def pool(pyramid: dict, boxes, out: int, sampling: int = 0):
    """{level: [y x c]}, boxes [r 4] in pixels of the image -> [r out out c], each box from the level of its size.

    Chunk by chunk, forgotten in between: the rows of all boxes would take gigabytes.
    """
    lowest, highest = min(pyramid), max(pyramid)
    r = boxes.shape[0]
    chunk = next(size for size in range(min(CHUNK, r), 0, -1) if r % size == 0)

    @jax.checkpoint
    def some(boxes):
        level, found = levels(boxes, lowest, highest), 0
        for i, features in pyramid.items():
            own = (level == i)[:, None, None, None]
            found = found + jnp.where(own, align(features, boxes, out, 2.0**-i, sampling), 0)
        return found

    found = jax.lax.map(some, boxes.reshape(r // chunk, chunk, 4))
    return found.reshape(r, *found.shape[2:])
