"""Learned relative-position biases: a number per head for the offset of every pair of tokens (Swin; BEiT, section 2.2).

A table of a grid of rows x columns has (2 rows - 1)(2 columns - 1) offsets, row by row; with a cls token three more
entries: from cls to a token, from a token to cls, from cls to itself.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.models.layers import exact
from mim_jax.models.posembed import resize_table

CLS_ENTRIES = 3


def offsets(grid) -> int:
    """How many offsets two tokens of a grid can have."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def entries(grid) -> int:
    """Of a table for a grid with a cls token."""
    return offsets(grid) + CLS_ENTRIES


def resize_offsets(table, old, new, cls: bool):
    """[(2r-1)(2c-1) (+3) heads] of a grid or window `old` -> that of `new`: bicubic over the offsets (as Swin's and BEiT's
    users do it); the entries of the cls token, which come last, are kept."""
    body, rest = (table[:-CLS_ENTRIES], table[-CLS_ENTRIES:]) if cls else (table, table[:0])
    spans = [tuple(2 * side - 1 for side in grid) for grid in (old, new)]
    body = resize_table(jnp.asarray(body)[None], *spans, cls=False)[0]
    return jnp.concatenate([body, jnp.asarray(rest)])


def bias_matrix(table, window):
    """[(2r-1)(2c-1) heads] -> [heads n n]: the table's row for the offset query - key, of every pair in a window.

    The gradient of a gather would add up in any order on a GPU, so slices make the matrix: offsets of neighbours are neighbours
    in the table. A TPU, which copies slices slowly, has products that pick.
    """
    r, c = window
    table = table.reshape(2 * r - 1, 2 * c - 1, -1)
    pairs = _by_products(table, r, c) if platforms.current() == "tpu" else _by_slices(table, r, c)
    return rearrange(pairs, "h i j k l -> h (i j) (k l)")


def _by_slices(table, r: int, c: int):
    """[2r-1 2c-1 heads] -> [heads r c r c], row and column of the query, then of the key."""
    flipped = table[::-1, ::-1]  # now key - query
    rows = jnp.stack([flipped[r - 1 - i : 2 * r - 1 - i] for i in range(r)])  # [query row, key row, offset, heads]
    both = jnp.stack([rows[:, :, c - 1 - j : 2 * c - 1 - j] for j in range(c)])  # [query column, row, row, column, heads]
    return rearrange(both, "j i k l h -> h i j k l")


def _by_products(table, r: int, c: int):
    """As `_by_slices`, by one-hot offsets."""
    of_rows, of_columns = (
        jnp.asarray(np.subtract.outer(range(n), range(n))[..., None] + n - 1 == np.arange(2 * n - 1), table.dtype)
        for n in (r, c)
    )
    rows = jnp.einsum("abh,ika->hikb", table, of_rows, precision=exact(table.dtype))
    return jnp.einsum("hikb,jlb->hijkl", rows, of_columns, precision=exact(table.dtype))


def view_bias(table, grid, view):
    """[offsets+3 heads] of a grid -> [heads 1+n 1+n] among cls and the n tokens of a view no larger than it."""
    (rows, columns), (r, c) = grid, view
    body = table[:-CLS_ENTRIES].reshape(2 * rows - 1, 2 * columns - 1, -1)
    body = body[rows - r : rows + r - 1, columns - c : columns + c - 1]
    body = bias_matrix(body.reshape(-1, table.shape[-1]), view)
    to_token, to_cls, to_itself = table[-CLS_ENTRIES:]  # [heads] each
    heads, n, _ = body.shape
    first = jnp.concatenate([to_itself[:, None], jnp.broadcast_to(to_token[:, None], (heads, n))], 1)
    rest = jnp.concatenate([jnp.broadcast_to(to_cls[:, None, None], (heads, n, 1)), body], 2)
    return jnp.concatenate([first[:, None], rest], 1)


@flax.struct.dataclass
class RelativeBias:
    """How to make of a table what a block adds to its logits.

    grid: the table's; view: rows and columns of what is looked at; ids: [r k] where only these tokens of the view are
    there, else None.
    """

    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    view: tuple[int, int] = flax.struct.field(pytree_node=False)
    ids: jax.Array | None = None

    def of(self, table):
        """[offsets+3 heads] -> [heads n n] or [r heads n n] for the tokens that are there."""
        matrix = view_bias(table, self.grid, self.view)
        if self.ids is None:
            return matrix
        there = jnp.pad(self.ids + 1, ((0, 0), (1, 0)))  # cls comes first
        return jax.vmap(lambda i: matrix[:, i[:, None], i[None, :]])(there)
