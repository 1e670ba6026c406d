"""Where objects may be (Faster R-CNN's region proposal network, arXiv 1506.01497): a head on the maps of a pyramid, and the
boxes that come of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.boxes import anchors, coding, suppression
from mim_jax.models.layers import Dense, LayerNorm
from mim_jax.models.pyramid import Conv

small = nn.initializers.normal(0.01)


class RegionProposals(nn.Module):
    """{level: [b y x c]} -> whether there is an object, logits [b n], and how it differs from the anchor, [b n 4], of the
    anchors of all levels: level, row, column, ratio, float32. The levels share all parameters. norm_eps: of LayerNorms after
    the convolutions, which have no bias then; 0: there are none."""

    width: int = 256
    norm_eps: float = 0.0
    each: int = len(anchors.RATIOS)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pyramid: dict):
        normed, same = self.norm_eps > 0, lambda x: x
        convs = [Conv(self.width, self.dtype, not normed, kernel_init=small, name=f"conv_{i}") for i in range(2)]
        norms = [LayerNorm(self.dtype, self.norm_eps, name=f"norm_{i}") if normed else same for i in range(2)]
        objectness = Dense(self.each, kernel_init=small, name="objectness")
        deltas = Dense(4 * self.each, kernel_init=small, name="deltas")
        found = []
        for x in pyramid.values():
            for conv, norm in zip(convs, norms):
                x = nn.relu(norm(conv(x)))
            shape = (x.shape[0], x.shape[1] * x.shape[2] * self.each)
            found.append((objectness(x).reshape(shape), deltas(x).reshape(*shape, 4)))
        return tuple(jnp.concatenate(parts, 1) for parts in zip(*found))


def pyramid_anchors(pyramid: dict, sizes, unit: float = 1.0) -> list[np.ndarray]:
    """Of every level [n 4]; `sizes`: pixels of a side, of each level; `unit`: pixels, of which level l has stride 2^l."""
    return [anchors.level_anchors(x.shape[1:3], unit * 2**level, size) for (level, x), size in zip(pyramid.items(), sizes)]


def proposals(logits, deltas, places, size, *, before: int, after: int, limit: float):
    """Of one image: logits [n], [n 4], the anchors of every level, (h, w) -> boxes [k 4] by falling logit, logits [k], bool [k]
    whether there is one.

    Of every level the `before` best become boxes inside the image; suppression within a level; the `after` best of all.
    """
    start, found = 0, []
    most = min(before, max(len(level) for level in places))
    for level in places:
        own = slice(start, start + len(level))
        best, index = jax.lax.top_k(logits[own], min(before, len(level)))
        boxes = coding.clip(coding.decode(deltas[own][index], jnp.asarray(level)[index]), size)
        there = coding.nonempty(boxes) & jnp.isfinite(best)
        more = most - len(index)
        found.append((jnp.pad(boxes, ((0, more), (0, 0))), jnp.pad(best, (0, more)), jnp.pad(there, (0, more))))
        start += len(level)
    boxes, scores, there = (jnp.stack(parts) for parts in zip(*found))
    kept = jax.vmap(lambda b, t: suppression.kept(b, t, limit))(boxes, there)
    scores = jnp.where(kept, scores, -jnp.inf).reshape(-1)
    best, index = jax.lax.top_k(scores, min(after, len(scores)))
    there = best > -jnp.inf
    return jnp.where(there[:, None], boxes.reshape(-1, 4)[index], 0), jnp.where(there, best, 0), there
