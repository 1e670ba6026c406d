"""A fixed number of boxes drawn for a loss, at most a share of them positive (arXiv 1504.08083, section 2.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drawn(NamedTuple):
    """`index` int32 [k] into the boxes, all different, positive ones first; bool [k] each: `positive`; `sampled`, which is
    False where there were not enough boxes."""

    index: jax.Array
    positive: jax.Array
    sampled: jax.Array


def draw(positive, negative, noise, size: int, most: int) -> Drawn:
    """bool [n], bool [n], uniform noise [n] in [0, 1) -> Drawn of `size` boxes: the positive ones of least noise, `most` at
    most, then the negative ones of least noise. Without replacement."""
    n = positive.shape[0]
    size, most = min(size, n), min(most, n)
    _, first = jax.lax.top_k(jnp.where(positive, -noise, -jnp.inf), most)
    chosen = jnp.zeros(n, bool).at[first].set(True, unique_indices=True) & positive
    order = jnp.where(chosen, 1 - noise, jnp.where(negative, -noise, -jnp.inf))
    _, index = jax.lax.top_k(order, size)
    return Drawn(index.astype(jnp.int32), chosen[index], (chosen | negative)[index])
