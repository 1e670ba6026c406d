"""BEiT's hiding: rectangles of tokens, of random area and aspect, until an exact number of tokens is hidden.

Source: arXiv 2106.08254, algorithm 1. The paper draws until the count is reached. Here every image gets TRIES proposals, so
that shapes and time are fixed and no image, nor device, waits for another; what is then missing is filled token by token.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking.random import TokenMask

# Measured on 20,000 images: how many are not complete after so many tries, and what they then lack on average.
#   grid, count, min_block     32 tries       48 tries       64 tries        96 tries
#   14x14, 75, 16 (BEiT)       13.5 %, 1.1    5.8 %, 1.0     2.4 %, 1.0      .6 %, 1.0
#   14x14, 78, 15 (MaskFeat)   10.9 %, 1.1    4.2 %, 1.0     1.7 %, 1.0      .3 %, 1.0
#   8x8, 25, 4                  .1 %, 1.0     .01 %, 1.0     none            none
# So at 64 one image in forty has one token, beside a block, that no rectangle brought.
TRIES = 64


def check(grid, count: int, min_block: int, min_aspect: float = 0.3):
    """Raises ConfigError for a mask that hides nothing or everything, and for blocks that the grid cannot hold."""
    rows, columns = grid
    n = rows * columns
    if not 1 <= count < n:
        raise ConfigError(
            f"count={count} of the {n} tokens of a {rows}x{columns} grid cannot be hidden; use 1 to {n - 1}, so that at "
            "least one is hidden and one visible"
        )
    if not 1 <= min_block <= count:
        raise ConfigError(f"min_block={min_block} is no block's size; use 1 to count={count} tokens")
    if not 0 < min_aspect <= 1:  # NaN included
        raise ConfigError(f"min_aspect={min_aspect} is not a ratio above 0 and up to 1; blocks lie in it and its inverse")
    # The sides are rounded, so that a block fits whose exact height is below rows + 1/2.
    lowest = max(min_aspect, min_block / (columns + 0.5) ** 2)
    highest = min(1 / min_aspect, (rows + 0.5) ** 2 / min_block)
    if lowest > highest:
        raise ConfigError(
            f"no block of min_block={min_block} tokens and an aspect within min_aspect={min_aspect} and its inverse fits "
            f"the {rows}x{columns} grid; use a smaller min_block or min_aspect"
        )


def draw(key, batch_size: int, grid, *, count: int, min_block: int, min_aspect: float = 0.3) -> TokenMask:
    """Hides exactly `count` tokens of every image, in blocks -> hidden [b n], n = rows * columns, row by row.

    Image i depends on the key and on i alone, not on the batch size: any number of devices. For settings that `check` lets
    pass.
    """
    hide = lambda key: hide_blocks(key, grid, count, min_block, min_aspect)
    return TokenMask(rearrange(jax.vmap(hide)(jax.random.split(key, batch_size)), "b r s -> b (r s)"))


def hide_blocks(key, grid, count: int, min_block: int, min_aspect: float, tries: int = TRIES):
    """One image's mask -> [rows columns] bool."""
    block_key, fill_key = jax.random.split(key)
    uniforms = jax.random.uniform(block_key, (tries, 4))
    hidden, missing = propose(uniforms, grid, count, min_block, min_aspect)
    return fill(hidden, missing, jax.random.bits(fill_key, grid))


def propose(uniforms, grid, count: int, min_block: int, min_aspect: float):
    """[tries 4] in [0, 1) -> hidden [rows columns] bool, and how many of `count` tokens are still missing, int32 [].

    A rectangle is accepted when it fits the grid and adds at least one token, and no more than are missing.
    """
    row, column = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])

    def attempt(carry, u):
        hidden, missing = carry
        top, left, height, width = rectangle(u, missing, grid, min_block, min_aspect)
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        added = (inside & ~hidden).sum()
        accept = (height <= grid[0]) & (width <= grid[1]) & (added <= missing)
        return (hidden | (inside & accept), missing - added * accept), None

    start = (jnp.zeros(grid, bool), jnp.int32(count))
    return jax.lax.scan(attempt, start, uniforms)[0]


def rectangle(uniforms, missing, grid, min_block: int, min_aspect: float):
    """[4] in [0, 1) -> top, left, height, width, int32 []; the sides may exceed the grid, and be 0.

    The area is uniform between `min_block` and `missing`, whichever is larger; the aspect height / width is log-uniform
    between `min_aspect` and its inverse; the place is uniform among those inside the grid.
    """
    area = min_block + uniforms[0] * (missing - min_block)
    aspect = jnp.exp((1 - 2 * uniforms[1]) * math.log(min_aspect))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect])))
    places = jnp.maximum(jnp.asarray(grid) - sides + 1, 1)
    corner = jnp.floor(uniforms[2:] * places)  # below n: jax.random.uniform ends at 1 - 2^-23, so u * n never rounds up
    return (*corner.astype(jnp.int32), *sides.astype(jnp.int32))


def fill(hidden, missing, bits):
    """[rows columns] bool, [], [rows columns] uint32 -> [rows columns] bool: hides `missing` more tokens.

    Those above, below or beside a hidden token come first; `bits` choose among equals.
    """
    n = hidden.size
    padded = jnp.pad(hidden, 1)
    touches = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    low = (n - 1).bit_length()
    number = jnp.arange(n, dtype=jnp.uint32).reshape(hidden.shape)
    score = (bits >> (low + 1) << low) | number  # with its number below, no token equals another: the count is exact
    score = jnp.where(hidden, 0, score | (touches.astype(jnp.uint32) << 31))
    return hidden | (score > jnp.sort(score, axis=None)[n - 1 - missing])
