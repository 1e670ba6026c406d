"""Boxes as differences from other boxes (R-CNN, arXiv 1311.2524, appendix C), and what else is computed of single boxes.

Boxes are float32 [... 4], x0 y0 x1 y1 in pixels. Differences are dx dy dw dh, each times its weight.
"""

import math

import jax.numpy as jnp

LARGEST = math.log(1000 / 16)  # dw and dh beyond are cut, so that exp cannot overflow


def sides(boxes):
    """[... 4] -> widths, heights."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def encode(boxes, reference, weights=(1.0, 1.0, 1.0, 1.0)):
    """[... 4], [... 4] -> [... 4]: how the boxes differ from those of reference; 0 for a reference without area."""
    (w, h), (own_w, own_h) = sides(reference), sides(boxes)
    real = (w > 0) & (h > 0) & (own_w > 0) & (own_h > 0)
    w, h, own_w, own_h = (jnp.where(real, side, 1.0) for side in (w, h, own_w, own_h))
    dx = (boxes[..., 0] + 0.5 * own_w - reference[..., 0] - 0.5 * w) / w
    dy = (boxes[..., 1] + 0.5 * own_h - reference[..., 1] - 0.5 * h) / h
    found = jnp.stack([dx, dy, jnp.log(own_w / w), jnp.log(own_h / h)], -1) * jnp.asarray(weights)
    return jnp.where(real[..., None], found, 0.0)


def decode(deltas, reference, weights=(1.0, 1.0, 1.0, 1.0)):
    """[... 4], [... 4] -> boxes [... 4]."""
    w, h = sides(reference)
    dx, dy, dw, dh = jnp.moveaxis(deltas / jnp.asarray(weights), -1, 0)
    x, y = dx * w + reference[..., 0] + 0.5 * w, dy * h + reference[..., 1] + 0.5 * h
    w, h = (0.5 * jnp.exp(jnp.minimum(d, LARGEST)) * side for d, side in ((dw, w), (dh, h)))
    return jnp.stack([x - w, y - h, x + w, y + h], -1)


def clip(boxes, size):
    """[... 4], (h, w) of the image, broadcast against the leading axes -> [... 4] inside it."""
    h, w = size
    limits = jnp.stack(jnp.broadcast_arrays(w, h, w, h), -1).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limits)


def nonempty(boxes):
    """[... 4] -> bool [...]: whether a box is finite and has area."""
    w, h = sides(boxes)
    return (w > 0) & (h > 0) & jnp.isfinite(boxes).all(-1)


def pairwise_iou(a, b):
    """[n 4], [m 4] -> [n m]: intersection over union, 0 where two boxes do not meet."""
    w = jnp.minimum(a[:, None, 2], b[None, :, 2]) - jnp.maximum(a[:, None, 0], b[None, :, 0])
    h = jnp.minimum(a[:, None, 3], b[None, :, 3]) - jnp.maximum(a[:, None, 1], b[None, :, 1])
    inside = jnp.maximum(w, 0) * jnp.maximum(h, 0)
    areas = [x * y for x, y in (sides(a), sides(b))]
    union = areas[0][:, None] + areas[1][None] - inside
    return jnp.where(inside > 0, inside / jnp.where(inside > 0, union, 1.0), 0.0)
