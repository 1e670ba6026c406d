"""Equal blocks in turn as one loop: a compiler sees one of them, however many there are."""

import jax
import jax.numpy as jnp

from mim_jax.tree import map_named


def in_turn(step, x, blocks: list, remat: bool = False):
    """x -> step(... step(step(x, blocks[0]), blocks[1]) ..., blocks[-1]), `step` being traced once.

    blocks: trees of one structure, shapes and types; they are stacked here, so that nobody else sees parameters otherwise than
    block by block, and the gradient of a stack is the parts it was made of. `step` gives what has the shape and type of x.
    With `remat` a backward pass computes each step anew.
    """
    # Nothing merges what is computed anew with the first time where the two are in different loops.
    each = jax.checkpoint(step, prevent_cse=False) if remat else step
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return jax.lax.scan(lambda x, block: (each(x, block), None), x, stacked)[0]


def kernels_as(params, dtype):
    """The parameters of a block with its kernels in the type that linear layers multiply in.

    Their layers would cast them anyway, so no value changes; stacked first they would be twice the bytes, and cast inside the
    loop kept once more for the gradient. All else is small, and some of it is used in float32.
    """
    return map_named(lambda path, x: x.astype(dtype) if path.endswith("/kernel") else x, params)
