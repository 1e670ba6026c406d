"""Which object a box is to find (Faster R-CNN, arXiv 1506.01497, section 3.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.boxes.coding import pairwise_iou


class Match(NamedTuple):
    """Of n boxes: the object of largest overlap, int32 [n] (0 where there is none), and what the box is: bool [n] each.
    Boxes of neither kind are ignored."""

    which: jax.Array
    positive: jax.Array
    negative: jax.Array


def match(boxes, objects, real, *, low: float, high: float, each: bool = False, claim: float = 0.0) -> Match:
    """[n 4], [g 4], bool [g] which objects are no padding -> Match: positive from overlap `high` on, negative below `low`.

    each: a box whose overlap equals the largest that some object has with any box is positive too, so that every object is
    to be found by a box. Such a box keeps the object that itself overlaps most. An object that no box meets claims none.
    claim: then only objects that some box overlaps by so much have such boxes, which become theirs: of several objects the
    last one's (mmdetection's rule).
    """
    overlap = jnp.where(real[:, None], pairwise_iou(objects, boxes), -1.0)
    # Equality below holds for the very same bits only; without this, XLA may compute them twice, rounded otherwise.
    overlap = jax.lax.optimization_barrier(overlap)
    which, best = overlap.argmax(0), overlap.max(0)
    positive, negative = best >= high, best < low
    if each:
        most = overlap.max(1, keepdims=True)
        claimed = (overlap == most) & (most >= claim) & (most > 0)
        positive |= claimed.any(0)
        if claim:
            which = jnp.where(claimed.any(0), len(objects) - 1 - claimed[::-1].argmax(0), which)
    return Match(which.astype(jnp.int32), positive, negative & ~positive)
