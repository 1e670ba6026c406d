"""Non-maximum suppression at fixed sizes, exactly as the greedy procedure: best score first, a box goes when it overlaps a
kept one of its group by *more* than the limit. Ties of scores keep the order of the boxes."""

import jax
import jax.numpy as jnp

from mim_jax.boxes.coding import pairwise_iou


def kept(boxes, there, limit: float):
    """[n 4] in order of falling scores, bool [n] -> bool [n]: which survive.

    Whether a box survives depends on earlier boxes alone, so the answers of all boxes at once, asked again and again, are
    right up to one more box each time, and the greedy procedure's when they no longer change: a few rounds, not n.
    """
    n = boxes.shape[0]
    order = jax.lax.iota(jnp.int32, n)
    beats = (pairwise_iou(boxes, boxes) > limit) & (order[:, None] < order[None, :])

    def survive(alive):
        return there & ~(beats & alive[:, None]).any(0)

    def again(state):
        alive, _ = state
        new = survive(alive)
        return new, (new != alive).any()

    return jax.lax.while_loop(lambda state: state[1], again, (there, jnp.bool_(True)))[0]


def best(boxes, scores, count: int, limit: float):
    """[n k 4] or [n 1 4] boxes for each of k classes, scores [n k], -inf for what is not there -> the first `count` that
    class-wise suppression keeps: int32 [count] the box, int32 [count] the class, bool [count] whether there is one.

    One at a time, which is exact whatever n k is, where all pairs would not fit.
    """
    k = scores.shape[1]

    def pick(scores, _):
        place = scores.argmax()
        row, column = place // k, place % k
        found = scores[row, column] > -jnp.inf
        own = boxes[:, jnp.minimum(column, boxes.shape[1] - 1)]
        gone = (pairwise_iou(own, own[row][None])[:, 0] > limit) | (jnp.arange(len(own)) == row)
        hit = gone[:, None] & (jnp.arange(k) == column)[None] & found
        return jnp.where(hit, -jnp.inf, scores), (row.astype(jnp.int32), column.astype(jnp.int32), found)

    return jax.lax.scan(pick, scores, length=count)[1]
